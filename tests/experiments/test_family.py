"""The measurements of the family, on cases where their values are known or can be had another way."""

import functools
import itertools
import json
import math
import operator
import statistics
from pathlib import Path

import pytest
import torch

from tvm_ref.experiments import (
    bound_over_training,
    compare,
    differences,
    family,
    family_measures,
    family_plots,
    variants,
)
from tvm_ref.experiments.family_measures import (
    MEMBERS,
    ExactNetwork,
    adaptive_bias,
    adaptive_minimiser,
    adaptive_velocity,
    batch,
    cost,
    flat_gradient,
    gradient_at_the_solution,
    gradients_of_jumps,
    line_with_velocity,
    noise_at_the_solution,
)
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.objectives import OBJECTIVES, mean_square
from tvm_ref.time_samplers import Times, TimeSampler
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork

PACKAGE = Path(family.__file__).parents[1]
SITE = PACKAGE.parent / "tutorials" / "site"
PAGE = (SITE / "objectives_measurements.md").read_text()
STORED = {p.stem: json.loads(p.read_text()) for p in (PACKAGE / "objectives").glob("*.json")}


def test_the_exact_network_is_the_exact_flow():
    oracle = make_distribution("moons")
    x0, x1, (t, s, _) = batch(oracle, 20, TimeSampler())
    x, model = x0 + t[:, None] * (x1 - x0), FlowMap(ExactNetwork(oracle))
    torch.testing.assert_close(model.jump(x, t, s), oracle.jump(x, t, s), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.velocity(x, t), oracle.velocity(x, t), rtol=1e-12, atol=1e-12)
    s[::2] = t[::2]  # also in one batch
    expected = torch.where((t == s)[:, None], oracle.velocity(x, t), oracle.displacement(x, t, s) / (s - t)[:, None])
    torch.testing.assert_close(model.F(x, t, s), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_lagrangian_and_semigroup_losses_are_silent_at_the_solution_and_the_random_velocity_is_heard(monkeypatch):
    silent = ("TVM", "LSD", "ESD", "ESD, stops convex", "PSD, midpoint")
    shown = [member for member in MEMBERS if member[0] in (*silent, "improved MeanFlow", "MeanFlow")]
    monkeypatch.setattr(family_measures, "MEMBERS", shown)
    noise = noise_at_the_solution(make_distribution("moons"), 20)
    for name in silent:
        assert noise[name]["mean"] < 1e-8, name
    assert noise["TVM"]["whole loss"] == pytest.approx(1, abs=1e-6)  # its other term is flow matching
    assert noise["improved MeanFlow"]["mean"] == pytest.approx(1, abs=1e-6)  # its residual is u - v: flow matching's
    assert noise["MeanFlow"]["mean"] > 0.1


@pytest.mark.slow
def test_the_noise_of_mean_flow_is_that_of_v_carried_by_the_map():
    """At the solution F - v - (s - t) D F = (grad_x X) (u - v): for N(0, sigma^2 I), a number times u - v."""
    sigma = 0.5
    oracle = GaussianMixture(torch.zeros(1, 2), sigma)
    x0, x1, times = batch(oracle, 30, TimeSampler())
    t, s, _ = times
    x = x0 + t[:, None] * (x1 - x0)

    def std(t):
        return ((1 - t) ** 2 * sigma**2 + t**2).sqrt()

    actual = gradient_at_the_solution("meanflow", {"power": 0}, oracle, x0, x1, times)
    residual = (std(s) / std(t))[:, None] * (oracle.velocity(x, t) - (x1 - x0))
    torch.testing.assert_close(actual, residual, rtol=1e-4, atol=1e-5)  # 2 R / D with D = 2


def test_costs_are_ordered_as_their_products_are():
    """Flow matching: forward and backward less the first layer's gradient for x. A JVP doubles a forward's products."""
    products = cost(width=64, depth=4)
    assert 2.5 < products["flow matching"] < 3
    velocity, tvm = products["flow matching"], products["TVM"]
    assert products["TVM, JVP detached"] < tvm
    # of the others each sample is a jump or flow matching, by the method's own fraction on the diagonal
    for name, jump, share in (
        ("LSD", tvm - velocity, 0.75),
        ("MeanFlow", velocity + 1, 0.75),
        ("improved MeanFlow", velocity + 2, 0.5),
        ("alpha-Flow, alpha 0.5", velocity + 1, 0.5),
        ("PSD, midpoint", velocity + 2, 0.75),
        ("sCT", velocity + 1, 0),
    ):
        assert products[name] == pytest.approx((1 - share) * jump + share * velocity, abs=0.05)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_the_minimiser_under_adaptive_weights_against_enumeration(eps):
    """Three coordinates of two values are eight velocities: the weighted residuals of all eight cancel."""
    v = torch.tensor([[[1.0, -0.5], [0.3, 2.0], [-1.0, -0.2]]], dtype=torch.float64)
    p = torch.tensor([[[0.6, 0.4], [0.8, 0.2], [0.5, 0.5]]], dtype=torch.float64)
    F = adaptive_minimiser(v, p, eps, iterations=2000)
    total = torch.zeros(3, dtype=torch.float64)
    for corner in itertools.product(range(2), repeat=3):
        chosen = torch.stack([v[0, i, k] for i, k in enumerate(corner)])
        mass = math.prod(float(p[0, i, k]) for i, k in enumerate(corner))
        residual = F[0] - chosen
        total += mass * residual / (residual.square().mean() + eps)
    assert float(total.abs().max()) < 1e-4


@pytest.mark.parametrize("eps", [1e-3, 0.1])
def test_the_minimiser_for_a_mixture_against_a_sum_over_a_grid(eps):
    """In 2D v given x_t is a density: the weighted residuals of all v on a grid cancel. With a large eps F is u."""
    centres = torch.tensor([[1.0, 0.0], [-0.5, 0.8], [0.2, -1.0]], dtype=torch.float64)
    oracle = GaussianMixture(centres, 0.6, weights=torch.tensor([1.0, 2.0, 1.5]))
    x, t = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)
    F = adaptive_velocity(oracle, x, t, eps, iterations=1000)
    axis = torch.linspace(-6, 6, 1201, dtype=torch.float64)
    x0 = torch.cartesian_prod(axis, axis)  # v = (x - x0) / t
    noise = (x - 0.3 * x0) / 0.7
    joint = (oracle.log_density(x0, torch.zeros(len(x0))) - noise.square().sum(1) / 2).softmax(0)
    residual = F - (x - x0) / 0.7
    weighted = residual / (residual.square().mean(1, keepdim=True) + eps)
    assert float((joint @ weighted).abs().max()) < 1e-3 * float(joint @ weighted.norm(dim=1))
    assert float((F - oracle.velocity(x, t)).abs().max()) > 0.05
    torch.testing.assert_close(adaptive_velocity(oracle, x, t, 1e6), oracle.velocity(x, t), rtol=1e-4, atol=1e-5)


def test_a_large_eps_is_no_weight_and_many_dimensions_make_the_bias_small():
    assert adaptive_bias(2, 0.8, 8, eps=1e6) < 1e-5
    few, many = adaptive_bias(2, 0.8, 8), adaptive_bias(64, 0.8, 8)
    assert few > 0.3
    assert many < few / 5


def exact_lines(oracle, gap, n):
    """Samples twice over, whose v is the exact average velocity of their jumps, and a network."""
    torch.manual_seed(0)
    model = FlowMap(ToyNetwork(2, 0, width=8, depth=1))
    torch.nn.init.normal_(model.network.output.weight, std=0.3)
    x, s = torch.randn(n, 2), 0.1 + 0.8 * (1 - gap) * torch.rand(n)
    x0, x1 = line_with_velocity(x, s + gap, oracle.displacement(x, s + gap, s) / -gap)
    return model, x, torch.cat([x0, x0]), torch.cat([x1, x1]), Times(*(torch.cat([a, a]) for a in (s + gap, s, s)))


def test_a_line_passes_its_point_with_its_velocity():
    x, velocity, t = (*torch.randn(2, 5, 2), torch.rand(5))
    x0, x1 = line_with_velocity(x, t, velocity)
    torch.testing.assert_close(interpolate(x0, x1, t), x)
    torch.testing.assert_close(x1 - x0, velocity)


def test_the_gradient_of_regression_on_the_exact_map_points_where_the_true_error_falls():
    """For jumps of one length X - psi is that length times F less its exact value; its negative points away."""
    oracle = make_distribution("moons")
    model, x, x0, x1, times = exact_lines(oracle, gap := 0.4, 32)
    t, s, _ = (a[:32] for a in times)
    true = flat_gradient(mean_square(model.jump(x, t, s) - oracle.jump(x, t, s)), model)
    regression = OBJECTIVES["alphaflow"](model, alpha=1.0, power=0)
    found = family_measures._compare(regression, oracle, (x0, x1), times, true, 32)  # two equal halves: no noise
    assert found.cosine == pytest.approx(1, abs=1e-4)
    assert found.noise_scale == pytest.approx(0, abs=1e-6)
    assert family_measures._compare(regression, oracle, (x0, x1), times, -true, 32).cosine == pytest.approx(
        -1, abs=1e-4
    )
    terms = regression(x0[:32], x1[:32], Times(t, s, s))
    torch.testing.assert_close(flat_gradient(terms.jump, model), true / gap**2, rtol=1e-3, atol=1e-5)


def test_with_the_exact_velocity_for_v_mean_flow_has_the_gradient_of_stopped_esd():
    oracle = make_distribution("moons")
    model, x, *_ = exact_lines(oracle, 0.4, 64)
    t, s = torch.rand(2, 64).sort(dim=0).values.flip(0)
    lines, times = line_with_velocity(x, t, oracle.velocity(x, t)), Times(t, s, s)
    esd = OBJECTIVES["esd"](model, stops="all")(*lines, times, target=oracle)
    mean_flow = OBJECTIVES["meanflow"](model, power=0)(*lines, times)
    torch.testing.assert_close(
        flat_gradient(esd.jump, model), flat_gradient(mean_flow.jump, model), rtol=1e-4, atol=1e-6
    )


@pytest.mark.slow
def test_the_noise_scale_is_that_of_gradients_sample_by_sample():
    """Mean and covariance of single samples' gradients, for one method; the estimates agree within their errors."""
    oracle = make_distribution("moons")
    torch.manual_seed(0)
    model = FlowMap(ToyNetwork(2, 0, width=8, depth=1))
    torch.nn.init.normal_(model.network.output.weight, std=0.3)
    gap, size, chunks = 0.5, 16, 64
    scale = gradients_of_jumps(model, oracle, [gap], chunks=chunks, size=size)["TVM"][0].noise_scale
    x0, x1, (u, _, fraction) = batch(oracle, 512, TimeSampler("triangle"), 3, dtype=torch.float32)
    s = u.square() * (1 - gap)
    times = Times(s + gap, s, fraction)
    objective = family_measures.OBJECTIVES["tvm"](model)
    parts = [(x0[i], x1[i], Times(*(a[i] for a in times))) for i in torch.arange(512).split(1)]
    single = torch.stack([flat_gradient(objective(*part, target=model).jump, model) for part in parts])
    expected = single.var(0).sum() / (single.mean(0).square().sum() - single.var(0).sum() / 512)
    assert scale == pytest.approx(float(expected), rel=0.5)


@pytest.mark.slow
def test_the_command_writes_its_parts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(family_measures, "MEMBERS", MEMBERS[:2])
    monkeypatch.setattr(family, "GAPS", (0.2, 0.8))
    monkeypatch.setattr(family_plots, "COSINES", {"TVM": ("black", "-"), "TVM, exact u": ("black", "--")})
    out = tmp_path / "family"
    options = ["--out", str(out), "--steps", "3", "--batch-size", "8", "--width", "8", "--depth", "2"]
    assert family.main([*options, "--samples", "4", "--dims", "1", "4"]) == 0
    report = json.loads((out / "results.json").read_text())
    measured = {"noise", "cost", "adaptive_bias", "gradients"}
    assert set(report) == {"dist", "made_with", "options", *measured}
    assert set(report["noise"]) == {name for name, _, _ in MEMBERS[:2]}
    assert (out / "family.png").is_file()
    assert (out / "cosines.png").is_file()
    printed = capsys.readouterr().out
    assert "noise at the solution" in printed
    assert "batch where noise = signal" in printed
    with pytest.raises(SystemExit) as stop:
        family.main([*options, "--parts", "picture"])
    assert stop.value.code == 2
    assert "already holds measurements: choose another --out" in capsys.readouterr().err
    assert json.loads((out / "results.json").read_text()) == report


def test_chosen_parts_have_a_folder_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(family_measures, "cost", lambda width, depth: {"TVM": float(width)})
    assert family.main(["--parts", "cost", "--width", "8"]) == 0
    report = json.loads((tmp_path / "runs/toy/moons-family-cost/results.json").read_text())
    assert report["cost"] == {"TVM": 8}
    assert report["made_with"]["width"] == 8


@pytest.mark.parametrize(
    ("table", "stored", "page"),
    [
        (compare.table, ["compare"], "toy_measurements.md"),
        (variants.table, ["causes"], "objectives_measurements.md"),
        (variants.table, ["relatives"], "objectives_measurements.md"),
        (differences.derivative_table, ["relatives", "derivative"], "objectives_measurements.md"),
        (family.gradient_table, ["family", "gradients"], "objectives_measurements.md"),
        (bound_over_training.table, ["guarantees", "moons"], "objectives_measurements.md"),
        (bound_over_training.table, ["guarantees", "checkerboard"], "objectives_measurements.md"),
    ],
)
def test_tables_of_the_pages_are_those_of_the_stored_results(table, stored, page):
    lines = [line.rstrip() for line in (SITE / page).read_text().splitlines()]
    text = table(functools.reduce(operator.getitem, stored, STORED))
    assert all(row.rstrip() in lines for row in text.splitlines()[1:])


def test_costs_and_errors_of_the_table_to_decide_by_are_stored():
    lines = [line for line in PAGE.splitlines() if line.startswith("| `") and line.count("|") == 9]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(rows) == len(OBJECTIVES)
    titles = {key: kind.method.title for key, kind in OBJECTIVES.items()}
    costs = {key: STORED["family"]["cost"][name] for name, key, _ in reversed(MEMBERS)}
    for key, _, cost_cell, _, errors, *_ in rows:
        key = key.strip("`")
        dit = STORED["family"]["cost_dit"]["DiT-XL/2"][key]
        assert cost_cell == f"{costs.get(key, STORED['family']['cost']['flow matching']):.1f} / {dit:.1f}"
        for nfe, cell in zip((1, 2, 4, 64), errors.split(" / "), strict=True):
            if cell != "-":
                runs = STORED["compare"]["methods"][titles[key]]["runs"]
                median = statistics.median(compare.error(result, nfe) for result in runs)
                assert float(cell) == pytest.approx(median, abs=0.0051 if median > 1 else 0.00051)
