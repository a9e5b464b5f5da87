import json

import pytest
import torch

from tvm_ref.objectives import OBJECTIVES
from tvm_ref.time_samplers import TimeSampler
from tvm_ref.toy import training as training_module
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.report.metrics import exact_samples, make_reference, paired_errors
from tvm_ref.toy.report.report import write_report
from tvm_ref.toy.run import SNAPSHOTS, Run, add_snapshot, load_run, read_config, snapshot_steps
from tvm_ref.toy.training import BLOCK, Training, draw_block, learning_rate

SMALL = {"batch_size": 16, "width": 8, "depth": 2, "steps": 90}
VARIANTS = {
    "tvm": {},
    "detached": {"settings": {"detach_jvp": True}},
    **{name: {"objective": name} for name in OBJECTIVES if name != "tvm"},
    "lsd, learned weight": {"objective": "lsd", "settings": {"learned_weight": True}},
    "conditional": {"conditional": True},
    "meanflow, unweighted": {"objective": "meanflow", "settings": {"power": 0.0}},  # on the plane its weight is biased
    "guided": {"conditional": True, "w": 2.0, "noise_share": 0.2},
}


def tensors(training: Training) -> list[torch.Tensor]:
    return [*training.objective.parameters(), *training.target.module.parameters(), *training.ema.module.parameters()]


def test_data_are_a_pure_function_of_seed_and_block():
    config, oracle = ToyConfig(**SMALL, conditional=True, w=2), make_distribution("moons")
    a, b = draw_block(config, oracle, 3), draw_block(config, oracle, 3)
    assert len(a) == BLOCK
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.x0, y.x0)
        assert torch.equal(x.x1, y.x1)
        assert all(torch.equal(p, q) for p, q in zip(x.times + x.condition, y.times + y.condition, strict=True))
    assert not torch.equal(a[0].x0, draw_block(config, oracle, 4)[0].x0)
    assert not torch.equal(a[0].x0, draw_block(ToyConfig(**SMALL, seed=1), oracle, 3)[0].x0)
    assert not torch.equal(a[0].x0, a[1].x0)


@pytest.mark.slow
def test_even_numbers_leave_the_mean_of_the_gradient_and_take_most_of_its_noise(monkeypatch):
    """Against independent numbers, on a network trained a little: equal within the error, a quarter of its variance."""
    config, oracle = ToyConfig(batch_size=256, width=16, depth=2), make_distribution("moons")
    training = Training(config, oracle)
    for _ in range(40):
        training.train_step()

    def gradients() -> torch.Tensor:
        rows = []
        for batch in (batch for block in (10, 11) for batch in draw_block(config, oracle, block)):
            training.optimizer.zero_grad()
            training.objective(batch.x0, batch.x1, batch.times, None, training.target.module).total.mean().backward()
            rows.append(torch.cat([p.grad.flatten() for p in training.model.parameters()]).double())
        return torch.stack(rows)

    even = gradients()
    monkeypatch.setattr(
        training_module, "uniform_numbers", lambda n, columns, *key: torch.rand(n, columns, dtype=torch.float64)
    )
    independent = gradients()
    assert float(even.var(0).sum()) < 0.25 * float(independent.var(0).sum())
    error = (even.mean(0) - independent.mean(0)) / (independent.var(0) / len(independent)).sqrt()
    assert float(error.square().mean()) < 2  # 1 + what the even ones add, if the means are one


def test_learning_rate_warms_up_and_falls_to_zero():
    config = ToyConfig(steps=1000, lr=0.5)
    assert learning_rate(config, 0) == pytest.approx(0.5 / 200)
    assert learning_rate(config, 500) == pytest.approx(0.25)
    assert learning_rate(config, 1000) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(tmp_path, variant):
    """Through the files of the run folder, stopped in the middle of a block and between two lines of the log.

    Training has gone on beyond the checkpoint before, so that a later snapshot is there already.
    """
    config = ToyConfig(**SMALL, **VARIANTS[variant])
    whole = Run(tmp_path / "whole", config)
    whole.create()
    assert whole.train()

    first = Run(tmp_path / "parts", config)
    first.create()
    sums = torch.zeros(2)
    for step in range(20):
        if step in snapshot_steps(90):
            add_snapshot(first.folder, step, first.training.ema.module.network.state_dict())
        sums += first.training.train_step()
    first.save(sums)
    add_snapshot(first.folder, 27, whole.training.ema.module.network.state_dict())
    second = Run(tmp_path / "parts", read_config(tmp_path / "parts"))
    assert second.train(second.load())
    assert all(torch.equal(a, b) for a, b in zip(tensors(whole.training), tensors(second.training), strict=True))

    def losses(folder):
        lines = [json.loads(line) for line in (tmp_path / folder / "train.jsonl").read_text().splitlines()]
        return [{k: line[k] for k in ("step", "jump", "flow_matching")} for line in lines]

    assert (first.folder / SNAPSHOTS).read_bytes() == (whole.folder / SNAPSHOTS).read_bytes()
    assert losses("whole") == losses("parts")
    assert [line["step"] for line in losses("whole")] == [50]


def test_log_lines_beyond_the_checkpoint_are_dropped_on_resume(tmp_path):
    config = ToyConfig(**SMALL)
    run = Run(tmp_path, config)
    run.create()
    run.train()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 40}, tmp_path / "checkpoint.pt")  # as if killed after the log had gone on
    again = Run(tmp_path, config)
    again.load()
    assert again.log == []
    assert (tmp_path / "train.jsonl").read_text() == ""


def test_a_loss_that_is_not_finite_stops_with_its_step_and_keeps_the_checkpoint(tmp_path):
    run = Run(tmp_path, ToyConfig(**SMALL))
    run.create()
    sums = run.training.train_step()
    run.save(sums)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with torch.no_grad():
        run.training.model.network.output.bias.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"diverged at step 1: the jump loss is NaN.*a smaller lr may help"):
        run.train(sums)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("variant", ["tvm", "pid", "meanflow, unweighted", "fm", "detached"])
@pytest.mark.slow
def test_training_approaches_the_exact_flow(variant):
    """600 steps bring the distance to the exact map under two thirds of an untrained network's.

    In one jump; flow matching, which learns none, in 16 steps, and MeanFlow, which learns long ones last, in 4.
    """
    config = ToyConfig(**VARIANTS[variant], steps=600, batch_size=128, width=32, depth=3, ema=0.99, dist="circles")
    oracle = make_distribution("circles")
    training, reference = Training(config, oracle), make_reference(oracle, points=300)
    nfe = {"fm": 16, "meanflow, unweighted": 4}.get(variant, 1)
    before = paired_errors(training.evaluated, reference, nfe)[1].square().mean().sqrt()
    while training.step < config.steps:
        training.train_step()
    after = paired_errors(training.evaluated, reference, nfe)[1].square().mean().sqrt()
    assert float(after) < 2 / 3 * float(before)


@pytest.mark.slow
def test_a_guided_model_approaches_the_exact_guided_flow():
    config = ToyConfig(**VARIANTS["guided"], steps=800, batch_size=128, width=32, depth=3, ema=0.99)
    oracle = make_distribution("moons")
    training = Training(config, oracle)
    guided, plain = (make_reference(oracle, w=w, points=300) for w in (2.0, 1.0))
    while training.step < config.steps:
        training.train_step()
    samples, errors = paired_errors(training.evaluated, guided, 2)
    assert float(errors.square().mean().sqrt()) < 0.35
    away = (samples - exact_samples(oracle, guided.noise, plain.condition)).norm(dim=1)
    assert float(away.square().mean()) > float(errors.square().mean())  # it learned the guided flow, not the plain one


@pytest.mark.slow
def test_a_finished_run_is_loaded_as_it_was_evaluated(tmp_path):
    config = ToyConfig(**SMALL)
    run = Run(tmp_path, config)
    run.create()
    run.train()
    write_report(run, points=50)
    loaded_config, oracle, model = load_run(tmp_path)
    assert loaded_config == config
    x1 = torch.randn(20, 2)
    one, zero = torch.ones(20), torch.zeros(20)
    assert torch.equal(model.jump(x1, one, zero), run.training.ema.module.jump(x1, one, zero))
    assert oracle.sigma == run.distribution.sigma


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"objective": "meanflow", "settings": {"powr": 1}}, "has no 'powr'; it has power, eps"),
        ({"objective": "meanflow", "settings": {"power": -1}}, "power must not be negative"),
        ({"objective": "lsd", "settings": {"null_label": 3}}, "has no 'null_label'"),
        ({"objective": "lsd", "settings": {"stops": "some"}}, "one of convex, none; got 'some'"),
        ({"objective": "lsd", "conditional": True, "w": 2.0}, "no guidance"),
        ({"objective": "lsd", "equal_share": 0.0}, "LSD meets the data only where t = s: equal_share"),
    ],
)
def test_bad_settings_of_an_objective_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        ToyConfig(**settings)


def test_times_are_those_of_the_objectives_own_paper_unless_told():
    for name, kind in OBJECTIVES.items():
        assert ToyConfig(objective=name).sampler() == kind.default_times
    config = ToyConfig(objective="meanflow", time_sampler="gap*", equal_share=0.5, noise_share=0.1)
    assert config.sampler() == TimeSampler("gap*", equal_share=0.5, noise_share=0.1)
    assert ToyConfig(objective="meanflow", time_sampler="clamp").sampler() == TimeSampler("clamp", equal_share=0.75)
    assert ToyConfig(objective="meanflow", settings={"power": "0"}).name == "moons-meanflow-power=0.0"


def test_a_learned_weight_is_trained_beside_the_model():
    config = ToyConfig(**SMALL, objective="lsd", settings={"learned_weight": True}, lr=0.1)
    training = Training(config, make_distribution("moons"))
    for _ in range(20):
        training.train_step()
    assert float(training.objective.weight.output.bias.detach().abs()) > 1e-3
