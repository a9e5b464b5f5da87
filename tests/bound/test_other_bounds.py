"""The bounds of other losses, and the slopes of the exact field, against closed forms and quadrature in float64."""

import math

import pytest
import torch
from torch import Tensor

from tests.bound.test_chain import draws, random_model
from tvm_ref.bound import chain, other_bounds
from tvm_ref.bound import paths as bound_paths
from tvm_ref.bound.paths import Draws, time_grid
from tvm_ref.flow_map import FlowMap
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork

LINE = GaussianMixture(torch.tensor([[-1.2], [0.1], [0.9]]), 0.4, torch.tensor([0.3, 0.5, 0.2]))  # in one dimension


def followed(model, oracle, x0, x1, s) -> tuple[Draws, bound_paths.Paths]:
    given = Draws(x0, x1)
    return given, bound_paths.follow(model, oracle, given.at(s[-1]), s, oracle.time_scale)


@pytest.mark.parametrize("t", [0.6, 1.0])
def test_the_eulerian_residual_integrates_to_the_error(t):
    """Holds for every sample, with its sign, and an arbitrary network: X_0 - Y_0 = int rho ds."""
    oracle, model = make_distribution("moons"), random_model(0).double()
    s = time_grid(t, oracle.time_scale, 192)
    _, paths = followed(model, oracle, *draws(oracle, 8), s)
    integral = bound_paths.integral(other_bounds.eulerian_residual(model, paths), s)
    torch.testing.assert_close(integral, paths.x[0] - paths.y[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_bounds_in_one_dimension_by_quadrature(seed):
    """W2 of a line is that of sorted points; expectations are sums over a grid of x, derivatives autograd's."""
    model = random_model(seed, dim=1).double().requires_grad_(False)
    quantiles = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    noise, s = torch.special.ndtri(quantiles)[:, None], time_grid(1.0, LINE.time_scale, 48)
    given, paths = followed(model, LINE, LINE.sample(500)[0], noise, s)
    x, step = torch.linspace(-6, 6, 601, dtype=torch.float64), 0.02

    def squares(time: float) -> Tensor:
        """E rho^2, and E[((dX/dx) (u - v))^2] beside it."""
        point, t = x[:, None].clone().requires_grad_(), torch.full_like(x, time).requires_grad_()
        X = point - t[:, None] * model.network(point, t, torch.zeros_like(t))
        dX_dx, dX_dt = torch.autograd.grad(X.sum(), (point, t))
        rho = dX_dt + dX_dx[:, 0] * LINE.velocity(point, t).detach()[:, 0]
        noise = dX_dx[:, 0].square() * LINE.velocity_variance(x[:, None], t.detach())
        density = LINE.log_density(x[:, None], t.detach()).exp()
        return torch.stack([(density * rho.square()).sum(), (density * noise).sum()]) * step

    eulerian, noise_of_v = bound_paths.integral(torch.stack([squares(float(time)) for time in s]), s)
    w2 = (paths.x[0].sort(0).values - paths.y[0].sort(0).values).square().mean().sqrt()
    assert w2 <= chain.rms(chain.displacement(paths)) <= eulerian.sqrt() * 1.001
    assert noise_of_v > 0.01
    found = other_bounds.measure(FlowMap(model.network), LINE, given, paths)
    assert found["eulerian"] == pytest.approx(float(eulerian.sqrt()), rel=5e-3)
    loss = other_bounds.mean_flow_loss(model, given, s)
    error = float(bound_paths.integral(loss.std(1) / math.sqrt(500), s))  # at most, were all times' draws the same
    assert found["mean_flow"] ** 2 == pytest.approx(float(eulerian + noise_of_v), abs=4 * error)


@pytest.mark.parametrize("name", ["moons", pytest.param("checkerboard", marks=pytest.mark.slow)])
def test_no_bound_is_below_the_error(name):
    oracle, model = make_distribution(name), random_model(2).double()
    given, paths = followed(model, oracle, *draws(oracle, 40), time_grid(1.0, oracle.time_scale, 32))
    found = other_bounds.measure(model, oracle, given, paths)
    assert chain.rms(chain.displacement(paths)) < found["eulerian"] < found["mean_flow"]
    assert found["eulerian"] < found["lagrangian"]


def test_gaussian_data_have_bounds_in_closed_form():
    """The untrained network is the flow of N(0, I): rho = 0, and E||(grad_x X)(u - v)||^2 = D / var_t^2."""
    oracle, model = GaussianMixture(torch.zeros(1, 2), 1.0), FlowMap(ToyNetwork()).double()
    s = time_grid(1.0, 0.7, 16)
    given, paths = followed(model, oracle, *draws(oracle, 1000), s)
    found = other_bounds.measure(model, oracle, given, paths)
    assert found["eulerian"] < 1e-4
    assert found["lagrangian"] < 1e-4
    expected = math.sqrt(2 * (1 + math.pi / 2))  # var_t = (1 - t)^2 + t^2
    assert found["mean_flow"] == pytest.approx(expected, rel=0.04)


def test_the_lagrangian_bound_of_a_linear_field():
    """u = -C x and a = e^(-C s): e(0) = int e^(C s) a ds = t, and the bound is sqrt(int e^s ds)."""
    C, s = 3.0, time_grid(1.0, 0.5, 256)
    a, zero = (-C * s).exp()[:, None, None] * torch.tensor([0.6, 0.8]).double(), torch.zeros(256 + 1, 1, 2).double()
    x = -(1 - s)[:, None, None] * a  # dx/ds = a - C x
    paths = bound_paths.Paths(s, x, zero, a - C * x, -C * x, zero, zero)
    assert float(chain.displacement(paths)) == pytest.approx(1)
    found = other_bounds.lagrangian(paths, torch.full_like(s, C))
    assert found == pytest.approx(math.sqrt(math.e - 1), rel=1e-4)


def test_the_exact_field_stands_for_the_models():
    """Its residual on the model's path is the difference of the velocities, as eq. 7 has it on the exact path."""
    oracle, model = make_distribution("moons"), random_model(1).double()
    _, paths = followed(model, oracle, *draws(oracle, 10), time_grid(1.0, oracle.time_scale, 8))
    exact = other_bounds.with_exact_field(oracle, paths)
    assert float(bound_paths.flow_matching_residual(exact).abs().max()) == 0
    at = [
        oracle.velocity(x, torch.full((10,), float(time), dtype=torch.float64))
        for time, x in zip(paths.s, paths.x, strict=True)
    ]
    expected = (paths.df_ds - torch.stack(at)).norm(dim=2)
    torch.testing.assert_close(bound_paths.terminal_velocity_residual(exact), expected)


def test_slopes_of_two_modes_in_one_dimension():
    """Cov(m | x) is m^2 at x = 0 and nearly none far away: u' = a - t (1 - t) m^2 / var^2 there, and a here."""
    m, sigma = 1.5, 0.3
    oracle, s = GaussianMixture(torch.tensor([[-m], [m]]), sigma), time_grid(1.0, 0.2, 16)
    variance = (1 - s) ** 2 * sigma**2 + s**2
    a, steep = (s - (1 - s) * sigma**2) / variance, s * (1 - s) * m**2 / variance**2
    points = torch.linspace(-60, 60, 121, dtype=torch.float64)[:, None]
    L, C = other_bounds.slopes(oracle, s, [points] * len(s))
    torch.testing.assert_close(C, torch.maximum(steep - a, -a))
    torch.testing.assert_close(L, torch.maximum((steep - a).abs(), a.abs()))


def test_over_the_plane_one_gaussian_has_the_slope_of_its_closed_form():
    """u = a x with a = d/ds log std, so int |a| = log(1 / least std) + log(sigma / least std)."""
    sigma = 0.5
    length, points = other_bounds.slope_integral(GaussianMixture(torch.zeros(1, 2), sigma), time_grid(1.0, 0.3))
    assert length == pytest.approx(math.log((1 + sigma**2) / sigma), rel=1e-3)
    assert points == 61**2


@pytest.mark.slow
def test_empty_places_decide_the_slope_of_the_exact_field():
    """Along draws of moons int L is below 10, over the plane above 40."""
    oracle = make_distribution("moons")
    s = time_grid(1.0, oracle.time_scale, 64)
    x0, x1 = draws(oracle, 500)
    L, _ = other_bounds.slopes(oracle, s, ((1 - time) * x0 + time * x1 for time in s))
    assert float(bound_paths.integral(L, s)) < 10
    assert other_bounds.slope_integral(oracle, s)[0] > 40
