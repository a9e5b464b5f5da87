import contextlib
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from imagenet.config import PRESETS, Config, build_model
from imagenet.cost import table
from imagenet.cost.flops import count_flops, counted_step_flops, forward_flops, least_step_flops
from imagenet.cost.memory import state_bytes
from imagenet.model.distributed import World
from imagenet.training.step import Training
from tvm_ref import EMA, OBJECTIVES, TVM, Condition, Linear, TimeSampler
from tvm_ref.seeding import uniform_numbers

CONFIG = Config(data="latents", input_size=8, in_channels=4, classes=10, hidden_size=64, depth=2, heads=2, w=2.0)
SIZES = {
    "small": CONFIG,
    "long": replace(CONFIG, input_size=32, hidden_size=32),  # attention outweighs layers
    "wide": replace(CONFIG, input_size=4, hidden_size=256, depth=1),
    "digits": Config(),
}


def step_flops(config: Config, batch: int = 3) -> int:
    """Count a TVM step as training runs it, on real numbers."""
    model = build_model(config)
    objective = TVM(model, null_label=config.classes if config.w != 1 else None, detach_jvp=config.detach_jvp)
    target = EMA(model, 0.99)
    x = torch.randn(batch, config.in_channels, config.input_size, config.input_size)
    condition = Condition(torch.zeros(batch, dtype=torch.long), torch.full((batch,), 1 / config.w))
    times = TimeSampler().draw(batch)
    return count_flops(lambda: objective(x, x, times, condition, target.module).total.mean().backward()) // batch


CASES = [(size, detached, 2.0) for size in SIZES for detached in (False, True)] + [("small", False, 1.0)]


@pytest.mark.parametrize(("size", "detached", "w"), CASES)
@pytest.mark.slow
def test_a_step_has_no_needless_arithmetic(size, detached, w):
    config = replace(SIZES[size], settings={"detach_jvp": detached}, w=w)
    least = least_step_flops(config.network(), detach_jvp=detached, guided=w != 1)
    assert least <= step_flops(config) <= 1.02 * least
    assert counted_step_flops(config) == step_flops(config)


def test_the_count_would_show_needless_products(monkeypatch):
    """With nn.Linear a JVP runs its product rule's empty half: 13 forwards' worth of layers in place of 11."""
    monkeypatch.setattr(Linear, "forward", nn.Linear.forward)
    monkeypatch.setattr("tvm_ref.flow_map.jvp_ready", contextlib.nullcontext)  # which would mend nn.Linear too
    config = SIZES["wide"]
    assert step_flops(config) > 1.15 * least_step_flops(config.network())


@pytest.mark.parametrize("size", SIZES)
def test_a_forward_is_counted_as_it_runs(size):
    config = SIZES[size]
    model = build_model(config).requires_grad_(False)
    x, t = torch.randn(1, config.in_channels, config.input_size, config.input_size), torch.ones(1)
    condition = Condition(torch.zeros(1, dtype=torch.long), t)
    assert count_flops(lambda: model.network(x, t, t, condition)) == forward_flops(config.network())


@pytest.mark.slow
def test_steps_of_other_objectives_cost_what_their_forwards_and_backwards_do():
    """In forwards: a backward is two, a tangent doubles both; alpha-Flow ends as MeanFlow, PSD adds two forwards.

    Three quarters of the samples of LSD, MeanFlow and PSD are flow matching, and half of alpha-Flow's.
    """
    forward = forward_flops(CONFIG.network())
    cost = {
        key: counted_step_flops(replace(CONFIG, objective=key, w=1.0)) / forward
        for key in ("tvm", "fm", "lsd", "meanflow", "alphaflow", "psd")
    }
    assert cost["fm"] == pytest.approx(3, abs=0.15)
    assert cost["meanflow"] == pytest.approx(cost["fm"] + 1 / 4, abs=0.05)
    assert cost["alphaflow"] == pytest.approx(cost["fm"] + 2 / 4, abs=0.05)
    assert cost["psd"] == pytest.approx(cost["fm"] + 2 / 4, abs=0.05)
    assert cost["lsd"] == pytest.approx(3 / 4 * cost["fm"] + (cost["tvm"] - cost["fm"]) / 4, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("key", ["lsd", "meanflow"])
def test_a_step_of_jumps_and_flow_matching_is_counted_as_it_runs(key):
    config = replace(CONFIG, objective=key, w=1.0)
    model = build_model(config)
    objective, target = config.make_objective(model), EMA(model, 0.99)
    x = torch.randn(64, config.in_channels, config.input_size, config.input_size)
    condition = Condition(torch.zeros(64, dtype=torch.long), torch.ones(64))
    times = config.sampler().from_uniform(uniform_numbers(64, 4, 1).T)  # 16 jumps
    run = count_flops(lambda: objective(x, x, times, condition, target.module).total.mean().backward())
    assert counted_step_flops(config) == pytest.approx(run / 64, rel=1e-3)


def test_known_sizes():
    """DiT-XL/2 at 256: 118.6 G multiplications with addition, as its paper says."""
    network = PRESETS["imagenet256-w2"].network()
    assert forward_flops(network) / 2e9 == pytest.approx(118.6, abs=0.1)
    assert least_step_flops(network) / forward_flops(network) == pytest.approx(11.1, abs=0.05)


@pytest.mark.slow
def test_the_table_of_objectives_has_a_row_for_each(monkeypatch, capsys):
    monkeypatch.setattr(table, "OBJECTIVES", ("fm", "soflow"))
    monkeypatch.setattr(table, "PRESETS", {"digits": CONFIG, "imagenet256-w2": replace(CONFIG, depth=1)})
    assert table.main(["--objectives"]) == 0
    out, err = capsys.readouterr()
    assert "2/2" in err  # it once took minutes without a word
    head, *rows = (line.split() for line in out.splitlines())
    assert head == ["objective", "digits", "imagenet256-w2", "memory"]
    assert [row[0] for row in rows] == ["fm", "soflow"]
    jumps = 1 - OBJECTIVES["soflow"].default_times.equal_share  # each calls the target once
    assert float(rows[1][1]) == pytest.approx(float(rows[0][1]) + jumps, abs=0.15)
    assert [row[3] for row in rows] == ["1.0", "1.0"]  # the target keeps nothing


def test_the_table_has_the_numbers(monkeypatch, capsys):
    monkeypatch.setattr(table, "PRESETS", {"one": replace(CONFIG, batch_size=128, steps=1000)})
    assert table.main([]) == 0
    head, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert head == ["preset", "weights", "state", "forward", "step", "detached", "training"]
    network = CONFIG.network()
    weights = sum(p.numel() for p in build_model(CONFIG).parameters())
    assert float(row[1]) * 1e6 == pytest.approx(weights, rel=1e-3)
    assert float(row[3]) * 1e9 == pytest.approx(state_bytes(CONFIG), rel=0.01)
    assert float(row[5]) * 1e9 == pytest.approx(forward_flops(network), rel=1e-3)
    assert float(row[7]) * 1e9 == pytest.approx(least_step_flops(network), rel=1e-3)
    assert float(row[11]) == pytest.approx(128e3 * least_step_flops(network), rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_the_state_has_the_bytes_of_a_training_s(optimizer):
    config = replace(CONFIG, optimizer=optimizer, objective="fm", batch_size=4)
    training = Training(config, World())
    for p in training.model.parameters():
        p.grad = torch.zeros_like(p)
    training.optimizer.step()
    networks = [training.model, training.target.module, training.ema.module]
    held = [p for network in networks for p in network.parameters()]
    held += [a for a in tree_leaves(training.optimizer.state_dict()["state"]) if isinstance(a, torch.Tensor)]
    assert state_bytes(config) == pytest.approx(sum(a.nbytes for a in held), rel=0.01)
