"""Guidance weights of the cases, eq. 96, and what is written."""

import json
from pathlib import Path

import pytest
import torch

from imagenet.experiments import random_guidance
from imagenet.experiments.random_guidance import METHODS, Case, Reweighted, guide, steadiness
from tests.commands import one_line
from tests.networks import Waves
from tests.objectives.samples import B, guidance, per_sample, setup
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import guided_velocity
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import TVM, guided_target
from tvm_ref.seeding import generator
from tvm_ref.shapes import over
from tvm_ref.time_samplers import TimeSampler
from tvm_ref.toy.training import Batch

ROOT, NULL = Path(__file__).parents[3], 3


def make_batch(n: int = 4000) -> Batch:
    """Samples in float64, a quarter of them without a class."""
    x0, x1 = torch.randn(2, n, 2, dtype=torch.float64)
    condition = guidance()[0]._replace(label=torch.arange(n) % 4, beta=torch.ones(n))
    return Batch(x0, x1, TimeSampler().draw(n, generator(0)), condition)


def test_weights_of_guidance():
    model, batch = FlowMap(Waves()), make_batch()
    classed = batch.condition.label != NULL
    bounds = {"constant": (2, 2), "random": (1, 3), "mixed": (1, 6)}
    for name, (least, most) in bounds.items():
        found = guide(batch, Case("TVM", name), model, NULL, generator(1))
        w = 1 / found.condition.beta
        assert torch.equal(w[~classed], torch.ones(1000))
        assert least <= float(w[classed].min()) + 1e-6 <= least * 1.3 + 1e-6
        assert most >= float(w[classed].max()) - 1e-6 >= most * 0.95 - 1e-6
        assert torch.equal(found.x0, batch.x0)
    beta = guide(batch, Case("TVM", "random"), model, NULL, generator(1)).condition.beta[classed]
    assert float(beta.mean()) == pytest.approx(2 / 3, abs=0.01)  # uniform on [1/3, 1]


def test_mixed_guidance_is_equation_96():
    """(w + kappa) v' + (1 - w - kappa) u(none) = w v + kappa u(c, 1) + (1 - w - kappa) u(none), at the same x_t."""
    model, batch = FlowMap(Waves()), make_batch()
    found = guide(batch, Case("MeanFlow", "mixed"), model, NULL, generator(1))
    x, t = interpolate(batch.x0, batch.x1, batch.times.t), batch.times.t
    torch.testing.assert_close(interpolate(found.x0, found.x1, t), x)
    source = generator(1)
    w, kappa = 1 + 2 * torch.rand(len(x), generator=source), 3 * torch.rand(len(x), generator=source)
    one, none = (batch.condition._replace(label=a) for a in (batch.condition.label, torch.full_like(t, NULL).long()))
    unconditional = model.velocity(x, t, none).detach()
    target = guided_target(conditional_velocity(found.x0, found.x1), x, t, found.condition, NULL, model)
    v, u = conditional_velocity(batch.x0, batch.x1), model.velocity(x, t, one).detach()
    expected = over(w, x) * v + over(kappa, x) * u + over(1 - w - kappa, x) * unconditional
    classed = batch.condition.label != NULL
    torch.testing.assert_close(target[classed], expected[classed], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(target[~classed], v[~classed], rtol=1e-6, atol=1e-6)
    assert float((target - guided_velocity(v, unconditional, found.condition.beta)).abs().max()) > 0.1


def test_a_reweighted_objective_has_another_power_of_w():
    model, target, x0, x1, times = setup()
    condition = guidance()[0]
    plain = TVM(model, null_label=NULL)(x0, x1, times, condition, target)
    found = Reweighted(TVM(model, null_label=NULL), -2)(x0, x1, times, condition, target)
    torch.testing.assert_close(found.total * condition.beta**2, plain.total)
    expected = per_sample(plain.total, model) / condition.beta[:, None] ** 2
    torch.testing.assert_close(per_sample(found.total, model), expected)
    assert len(found.total) == B


def test_steadiness_of_known_norms():
    """In the second half: 99 norms of 2 and one of 20, losses that double once."""
    rows = [[9.0, 9.0]] * 100 + [[1.0, 2.0]] * 90 + [[2.0, 2.0]] * 9 + [[2.0, 20.0]]
    found = steadiness(torch.tensor(rows))
    assert found["norm"] == 2
    assert found["max"] == 10
    assert found["loss q99"] == 2
    assert found["q99"] == pytest.approx(1.09)


def test_bad_cases(capsys):
    for case in ("TVM", "TVM:often", "GAN:random", "TVM:random:0.9"):
        assert case in one_line(capsys, random_guidance.main, ["--cases", case])


@pytest.mark.slow
@pytest.mark.parametrize("data", ["moons", "digits"])
def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch, data):
    monkeypatch.setattr(random_guidance.Digits, "quality", lambda self, reference: {"1": 1.0, "4": 2.0})
    cases = [f"{name}:mixed" for name in METHODS] + ["TVM:constant:0.999"]
    sizes = ["--data", data, "--steps", "4", "--seeds", "1", "--batch-size", "16"]
    assert random_guidance.main([*sizes, "--out", str(tmp_path / "out"), "--cases", *cases]) == 0
    report = json.loads((tmp_path / "out/results.json").read_text())
    assert all(len(run["norms"]) == 1 and run["found"] for runs in report["cases"].values() for run in runs)
    assert random_guidance.table(report) in capsys.readouterr().out


def test_the_tables_of_the_page_are_those_of_the_stored_results():
    stored = json.loads((ROOT / "tvm_ref/objectives/random_guidance.json").read_text())
    page = (ROOT / "tutorials/site/objectives_measurements.md").read_text()
    lines = [line.rstrip() for line in page.splitlines()]
    for report in stored.values():
        assert all(row.rstrip() in lines for row in random_guidance.table(report).splitlines())
