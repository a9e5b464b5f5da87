"""One step of training: its losses and gradients against a straight-line float64 computation, and its invariances."""

import shutil
from dataclasses import replace

import pytest
import torch

from imagenet import train
from imagenet.config import Config, build_model
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.model.distributed import World
from imagenet.training.step import Training, learning_rate, make_optimizer
from tests.imagenet import straight_line
from tests.imagenet.commands import same
from tests.imagenet.workers import SMALL, randomise
from tvm_ref import TVM, Condition, TimeSampler

ALONE = World()


def make(config=SMALL, seed=0):
    """A training whose network is not at its zero start."""
    training = Training(config, ALONE)
    for module, offset in ((training.model, 0), (training.target.module, 1), (training.ema.module, 2)):
        randomise(module, seed + offset)
    return training


def batches(config=SMALL):
    return Batches(config, load_data(config))


def assert_same(a, b, **tolerance):
    for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_losses_and_all_gradients_are_those_of_a_straight_line_computation(scaled, checkpointing):
    config = Config(
        input_size=6, in_channels=2, patch_size=2, hidden_size=16, depth=2, heads=2, classes=5, scaled=scaled,
        checkpointing=checkpointing,
    )  # fmt: skip
    model = randomise(build_model(config).double())
    target = randomise(build_model(config).double(), 1).requires_grad_(False)
    x0, x1 = torch.randn(2, 4, 2, 6, 6, dtype=torch.float64)
    times = [a.double() for a in TimeSampler(equal_share=0.3).draw(4, torch.Generator().manual_seed(3))]
    times[0][0] = times[1][0]  # a sample with t = s
    label, beta = torch.tensor([0, 3, 5, 1]), torch.tensor([0.5, 0.7, 1.0, 0.4], dtype=torch.float64)

    terms = TVM(model, null_label=5)(x0, x1, type(TimeSampler().draw(1))(*times), Condition(label, beta), target)
    terms.total.mean().backward()

    weights = {name: a.detach().clone() for name, a in model.network.state_dict().items()}
    named = dict(model.network.named_parameters())
    for name in named:
        weights[name].requires_grad_()
    expected = straight_line.losses(
        weights, target.network.state_dict(), x0, x1, times, label, beta,
        null_label=5, scaled=scaled, heads=2, depth=2, patch=2,
    )  # fmt: skip
    torch.testing.assert_close(terms.jump, expected[0], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(terms.flow_matching, expected[1], rtol=1e-10, atol=1e-12)
    assert terms.jump[0] == 0
    sum(expected).mean().backward()
    for name, p in named.items():
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_two_micro_batches_are_one_batch():
    one, two = make(), make(replace(SMALL, accumulate=2))
    for step in range(3):
        metrics = [training.train_step(batches()[step]) for training in (one, two)]
        assert metrics[0].losses == pytest.approx(metrics[1].losses, rel=1e-5)
        assert metrics[0].gradient_norm == pytest.approx(metrics[1].gradient_norm, rel=1e-5)
        if step == 0:
            for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)


LEARNED = {"objective": "lsd", "w": 1.0, "settings": {"learned_weight": True}}


@pytest.mark.slow
def test_a_loaded_state_with_a_learned_weight_goes_on_bit_for_bit():
    config = replace(SMALL, **LEARNED)
    data = batches(config)
    whole, half, other = make(config), make(config), make(config, seed=7)
    for step in range(6):
        whole.train_step(data[step])
        if step < 3:
            half.train_step(data[step])
    other.load_state_dict(half.state_dict())
    for step in range(3, 6):
        other.train_step(data[step])
    for part in ("model", "weight", "target", "ema"):
        assert same(whole.state_dict()[part], other.state_dict()[part])


def test_a_learned_weight_is_trained_beside_the_model():
    config = replace(SMALL, **LEARNED)
    training, data = make(config), batches(config)
    for step in range(3):
        training.train_step(data[step])
    assert float(training.weight.output.bias.detach().abs()) > 0
    assert list(training.objective.parameters())[-1] is training.weight.output.bias
    assert not list(make().weight.parameters())


def test_a_step_is_adamw_on_the_clipped_gradient_and_both_averages_follow():
    config = replace(SMALL, clip=0.1, schedule="constant", warmup=0)
    training = make(config)
    batch = batches()[0]
    reference = make(config)
    part = batch
    terms = reference.objective(part.x0, part.x1, part.times, part.condition, reference.target.module)
    terms.total.mean().backward()
    norm = torch.stack([p.grad.norm() for p in reference.model.parameters()]).norm()
    before = [[p.clone() for p in e.module.parameters()] for e in (training.target, training.ema)]
    metrics = training.train_step(batch)
    expected = [float(term.detach().mean()) for term in (terms.jump, terms.flow_matching)]
    assert list(metrics.losses) == pytest.approx(expected)
    assert metrics.gradient_norm == pytest.approx(float(norm), rel=1e-5)
    assert norm > 0.1
    for p, q, target, ema, t0, e0 in zip(
        training.model.parameters(), reference.model.parameters(), training.target.module.parameters(),
        training.ema.module.parameters(), *before, strict=True,
    ):  # fmt: skip
        g = q.grad * 0.1 / (norm + 1e-6)
        torch.testing.assert_close(p, q - 1e-3 * g / (g.abs() + 1e-8), rtol=1e-4, atol=1e-6)  # Adam's first step
        torch.testing.assert_close(target, 0.1 * t0 + 0.9 * p, rtol=1e-5, atol=1e-6)  # first update: d = 1/10
        torch.testing.assert_close(ema, 0.1 * e0 + 0.9 * p, rtol=1e-5, atol=1e-6)


def test_bfloat16_keeps_float32_weights_and_comes_close():
    exact, rounded = make(), make(replace(SMALL, precision="bfloat16"))
    a, b = exact.train_step(batches()[0]), rounded.train_step(batches()[0])
    assert b.losses == pytest.approx(a.losses, rel=0.03)
    assert b.losses != pytest.approx(a.losses, rel=1e-5)
    assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=0.1)
    for module in (rounded.model, rounded.target.module, rounded.ema.module):
        assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in rounded.model.parameters()} == {torch.float32}


@pytest.mark.compiles
@pytest.mark.skipif(shutil.which("c++") is None and shutil.which("g++") is None, reason="compiling needs C++")
@pytest.mark.slow
def test_the_compiled_loss_is_the_loss():
    config = replace(SMALL, depth=1, clip=0.0)
    eager, compiled = make(config), make(replace(config, compile=True))
    for step in range(2):
        a, b = eager.train_step(batches()[step]), compiled.train_step(batches()[step])
        assert b.losses == pytest.approx(a.losses, rel=1e-5)
        assert b.gradient_norm == pytest.approx(a.gradient_norm, rel=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert_same(eager, compiled, rtol=0, atol=1e-4)


@pytest.mark.parametrize("term", ["jump", "flow_matching", "gradient"])
def test_what_is_not_finite_stops_with_step_term_and_rank_before_the_weights_move(term):
    training = make()
    training.train_step(batches()[0])
    batch = batches()[1]
    if term == "gradient":  # finite loss, infinite slope
        training.model.network.final_layer.linear.bias.register_hook(lambda g: g * float("inf"))
    else:
        objective = training.objective

        class Broken(torch.nn.Module):
            def forward(self, *args):
                terms = objective(*args)
                getattr(terms, term)[3] = float("nan")
                return terms

        training.objective = Broken()
    before = [p.clone() for p in training.model.parameters()]
    with pytest.raises(FloatingPointError, match=rf"step 1: the {term}.* on rank 0"):
        training.train_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, training.model.parameters(), strict=True))


def test_learning_rates():
    constant = replace(SMALL, schedule="constant", lr=1e-4, warmup=0)
    assert {learning_rate(constant, k) for k in (0, 25, 49)} == {1e-4}
    cosine = replace(SMALL, lr=1.0, warmup=3, steps=100)
    rates = [learning_rate(cosine, k) for k in range(101)]
    assert rates[:3] == pytest.approx([0.25, 0.5, 0.75], rel=0.01)
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert max(rates) < 1


def test_optimizers_do_not_decay_weights():
    for name in ("adamw", "soap"):
        p = torch.nn.Parameter(torch.ones(4, 4))
        optimizer = make_optimizer(replace(SMALL, optimizer=name), [p])
        for _ in range(3):
            p.grad = torch.zeros(4, 4)
            optimizer.step()
        assert torch.equal(p, torch.ones(4, 4)), name


def test_a_curriculum_moves_with_training_and_goes_on_where_it_was():
    """alpha-Flow's alpha once stayed at 1, flow matching along chords, as nobody told the objective of the steps."""
    config = replace(SMALL, objective="alphaflow", time_sampler="own", w=1.0, steps=3)
    training, data = make(config), batches(config)
    alphas = []
    for step in range(3):
        training.train_step(data[step])
        alphas.append(float(training.objective.alpha_now))
    method = training.objective
    assert alphas == pytest.approx([method.alpha(0), method.alpha(1 / 3), method.alpha(2 / 3)])
    assert alphas[0] > 0.99 > alphas[1] > alphas[2]


@pytest.mark.parametrize("objective", ["alphaflow", "soflow"])
def test_a_curriculum_is_shaped_by_the_steps_as_a_cosine_is(tmp_path, objective):
    """Going on for more steps would have been another curriculum from its first step on."""
    stored = replace(SMALL, objective=objective, time_sampler="own", w=1.0, steps=4, schedule="constant")
    (tmp_path / "config.json").write_text(stored.to_json())
    assert train.stored_config(tmp_path, {"steps": 4}) == stored
    with pytest.raises(ValueError, match=f"--steps 4, as its --objective {objective} was shaped by them"):
        train.stored_config(tmp_path, {"steps": 5})
