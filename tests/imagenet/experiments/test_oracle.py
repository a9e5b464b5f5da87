"""The exact flow of digits in 64 dimensions against an independent reference, and the command."""

import json
import math
from pathlib import Path

import pytest
import torch

from imagenet.data.digits import load_digits
from imagenet.experiments import oracle
from imagenet.experiments.oracle import BANDWIDTHS, ImageMixture, configs, held_out_likelihood
from tvm_ref.bound.measuring import Measuring
from tvm_ref.exact_flow import follow
from tvm_ref.experiments.family_measures import step_products
from tvm_ref.guidance import Condition

ROOT, N, D = Path(__file__).parents[3], 20, 64


@pytest.fixture(scope="module")
def mixture():
    x, labels = load_digits().train
    return ImageMixture(x, 0.28, labels)


def test_images_are_standardised_by_one_number(mixture):
    x, _ = load_digits().train
    assert float(mixture.centres.square().mean()) + mixture.sigma**2 == pytest.approx(1)
    torch.testing.assert_close(mixture.restore(mixture.centres), x.flatten(1).double())
    assert mixture.sigma * mixture.deviation == pytest.approx(0.28)


def reference_velocity(mixture, x, t, members):
    """E[x1 - x0 | x_t] by Tweedie's formula, of the gradient of the log density of the noised mixture, by autograd."""
    x, time = x.clone().requires_grad_(), t[:, None]
    variance = ((1 - time) * mixture.sigma) ** 2 + time**2
    square = ((x[:, None] - (1 - time)[..., None] * members) ** 2).sum(2)
    (score,) = torch.autograd.grad((-square / (2 * variance)).exp().sum(1).log().sum(), x)
    x1 = -time * score
    return x1 - (x.detach() - time * x1) / (1 - time)


def test_velocity_against_the_gradient_of_the_log_density(mixture):
    """Without classes, of a class, and guided: w u(x, t, c) + (1 - w) u(x, t)."""
    generator = torch.Generator().manual_seed(0)
    x0, _ = mixture.sample(N, generator)
    t = torch.linspace(0.2, 0.98, N, dtype=torch.float64)
    x = (1 - t)[:, None] * x0 + t[:, None] * torch.randn(N, D, generator=generator, dtype=torch.float64)
    free = reference_velocity(mixture, x, t, mixture.centres)
    torch.testing.assert_close(mixture.velocity(x, t), free, rtol=1e-8, atol=1e-8)
    three = torch.full((N,), 3)
    of_class = reference_velocity(mixture, x, t, mixture.centres[load_digits().train[1] == 3])
    for w in (1.0, 2.0):
        found = mixture.velocity(x, t, Condition(three, torch.full((N,), 1 / w)))
        torch.testing.assert_close(found, w * of_class + (1 - w) * free, rtol=1e-8, atol=1e-8)


def test_the_flow_map_converges_at_order_four_and_composes(mixture):
    x1, one = torch.randn(4, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64), torch.ones(4)
    ends = [follow(mixture.velocity, x1, one, 0 * one, mixture.time_scale, steps) for steps in (48, 96, 192)]
    errors = [float((end - ends[2]).norm()) for end in ends[:2]]
    assert errors[0] / errors[1] > 10
    assert errors[1] / math.sqrt(4 * D) < 1e-5
    half = mixture.jump(x1, one, 0.6 * one)
    torch.testing.assert_close(mixture.jump(half, 0.6 * one, 0 * one), ends[2], rtol=0, atol=1e-2)
    torch.testing.assert_close(mixture.jump(half, 0.6 * one, one), x1, rtol=0, atol=1e-4)


def test_the_likeliest_bandwidth_around_one_image_is_the_deviation_from_it():
    held_out = 0.3 * torch.randn(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    values = [held_out_likelihood(torch.zeros(1, 1, 8, 8), held_out, h) for h in BANDWIDTHS]
    deviation = float(held_out.square().mean().sqrt())
    assert abs(BANDWIDTHS[values.index(max(values))] - deviation) < 0.01
    assert max(values) == pytest.approx(-D / 2 * (1 + math.log(2 * math.pi * deviation**2)), rel=1e-3)


def test_trainings_have_equal_products():
    made = configs(["tvm", "lsd", "fm"], 1000, None, D)
    assert made["tvm"].steps == 1000
    products = [config.steps * step_products(config, dim=D) for config in made.values()]
    assert products == pytest.approx([products[0]] * 3, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--w", "2"], ["--seeds", "0"]])
def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch, options):
    for name, value in {"MEASURING": Measuring(points=10, grid=4), "FEW": 2, "POINTS": 20}.items():
        monkeypatch.setattr(oracle, name, value)
    small = ["--steps", "2", "--seeds", "1", "--out", str(tmp_path / "o"), "--objectives", "tvm", "fm"]
    assert oracle.main([*small, *options]) == 0
    report = json.loads((tmp_path / "o/results.json").read_text())
    assert ("chain" in report) == (not options)
    assert ("bias" in report) == ("0" in options)
    assert oracle.table(report) in capsys.readouterr().out
    assert (tmp_path / "o/oracle.png").stat().st_size


def test_the_tables_of_the_page_are_those_of_the_stored_results():
    page = (ROOT / "tutorials/site/imagenet_oracle.md").read_text()
    lines = [line.rstrip() for line in page.splitlines()]
    for report in json.loads((ROOT / "tutorials/pictures/oracle.json").read_text()).values():
        assert all(row.rstrip() in lines for row in oracle.table(report).splitlines())
