"""The chain of theorem 1, link by link. Tolerances are the quadrature errors that the result reports, no more."""

import functools
import math

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from tvm_ref.bound import chain
from tvm_ref.bound import paths as bound_paths
from tvm_ref.bound.lipschitz import jacobian_norms
from tvm_ref.bound.paths import Draws, time_grid
from tvm_ref.distances import wasserstein2
from tvm_ref.flow_map import FlowMap
from tvm_ref.shapes import over
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import DISTRIBUTIONS, make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.network import ToyNetwork
from tvm_ref.toy.training import Training

SMALL = {"width": 16, "depth": 2}
TIMES = (0.3, 0.7, 1.0)


def draws(oracle: GaussianMixture, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return oracle.sample(n, generator)[0], torch.randn(n, oracle.dim, generator=generator, dtype=torch.float64)


def random_model(seed: int, **options) -> FlowMap:
    """Untrained, its last layer drawn like the others (ToyNetwork's own is zero: the exact flow of N(0, I))."""
    torch.manual_seed(seed)
    network = ToyNetwork(**SMALL, **options)
    nn.init.normal_(network.output.weight, std=0.5)
    return FlowMap(network)


@functools.cache
def trained_model(name: str, seed: int, steps: int = 200) -> FlowMap:
    training = Training(ToyConfig(dist=name, steps=steps, batch_size=128, seed=seed, **SMALL), make_distribution(name))
    while training.step < steps:
        training.train_step()
    return training.ema.module


def measured(
    model, oracle: GaussianMixture, t: float = 1.0, n: int = 100, steps: int = 64, seed: int = 0
) -> chain.Bound:
    scale = oracle.time_scale
    return chain.measure(model, oracle, Draws(*draws(oracle, n, seed)), time_grid(t, scale, steps), scale)


@pytest.mark.parametrize(("name", "seed"), [(name, i % 3) for i, name in enumerate(DISTRIBUTIONS)])
@pytest.mark.slow
def test_every_link_holds(name, seed):
    """Networks are trained and random in turn."""
    oracle = make_distribution(name)
    model = random_model(seed) if list(DISTRIBUTIONS).index(name) % 2 else trained_model(name, seed)
    for t in {TIMES[seed], TIMES[-1]}:
        bound = measured(model, oracle, t, n=60, seed=seed)
        assert bound.violations() == [], f"t = {t}"
        assert all(math.isfinite(value) for value in bound.values.values())
        assert bound.quadrature_error <= 0.1 * max(bound.values["pathwise_one_sided"], bound.values["displacement"])
        difference = bound.values["global_from_loss"] - bound.values["global"]
        assert abs(difference) <= 5 * bound.standard_error, f"t = {t}: the loss disagrees with its residuals"
        w2, coupling = bound.values["w2"], bound.values["displacement"]
        assert w2 <= coupling * (1 + 1e-9)  # exact: no quadrature, no statistics


def test_every_link_holds_in_the_small():
    """One distribution, a random network and a few points; the slow test goes through all of them."""
    bound = measured(random_model(1), make_distribution("eight_gaussians"), t=0.7, n=20, steps=32)
    assert bound.violations() == []
    assert bound.values["w2"] <= bound.values["displacement"] * (1 + 1e-9)
    assert abs(bound.values["global_from_loss"] - bound.values["global"]) <= 5 * bound.standard_error


def test_a_violated_link_is_named():
    bound = measured(random_model(0), make_distribution("moons"), n=20, steps=16)
    bound.values["displacement"] = 10 * max(bound.values[name] for name in ("terminal_velocity", "pathwise_one_sided"))
    names = [line.split()[0] + " " + line.split()[3] for line in bound.violations()]
    assert names == [f"displacement {name}" for name in ("terminal_velocity", "mean_square", "pathwise_one_sided")]


@pytest.mark.parametrize("state", ["random", pytest.param("trained", marks=pytest.mark.slow)])
def test_with_signs_groenwall_is_an_identity(state):
    """d/ds e = <n, residuals> - m e, n the unit vector from Y to X, so e(0) = -int exp(int m) <n, a + b> ds.

    It fails for a wrong sign or size of a, b or m. Without signs it bounds the error of every single point.
    """
    model = random_model(0) if state == "random" else trained_model("moons", 0)
    bound = measured(model, make_distribution("moons"), n=20 if state == "random" else 100, steps=256)

    def signed(paths: chain.Paths) -> Tensor:
        apart = paths.x - paths.y
        direction = apart / apart.norm(dim=2, keepdim=True).clamp_min(1e-12)
        residual = (direction * (paths.df_ds - paths.u_x + paths.u_y - paths.exact)).sum(2)
        growth = bound_paths.running_integral(chain.one_sided_rate(paths), paths.s).exp()
        return -bound_paths.integral(growth * residual, paths.s)

    fine, coarse = signed(bound.paths), signed(bound.paths.thinned())
    error = chain.rms(fine - coarse) + bound.errors["displacement"]
    assert chain.rms(fine - chain.displacement(bound.paths)) <= error < 0.01 * bound.values["displacement"]
    terms, coarse = (chain.pointwise_terms(paths) for paths in (bound.paths, bound.paths.thinned()))
    for name in ("terminal_velocity", "pathwise_one_sided", "pathwise_two_sided"):
        error = (terms[name] - coarse[name]).abs() + bound.errors["displacement"]
        assert (terms["displacement"] <= terms[name] + error).all(), name


@pytest.mark.parametrize("steps", [4, 6, 10])
def test_the_links_between_bounds_are_exact_on_any_grid(steps):
    """Positive weights that sum to t, and L above every observed ratio: no tolerance is needed, however coarse."""
    values = measured(random_model(1), make_distribution("pinwheel"), t=0.7, n=30, steps=steps).values
    assert values["mean_square"] <= values["global"]
    assert values["pathwise_one_sided"] <= values["pathwise_two_sided"] <= values["global"]


def test_lipschitz_is_at_least_every_jacobian_and_every_ratio_seen():
    oracle = make_distribution("moons")
    model = random_model(2).double()
    bound = measured(model, oracle, n=30, steps=16)
    assert (bound.lipschitz >= chain.two_sided_rate(bound.paths).amax(1)).all()
    assert (chain.two_sided_rate(bound.paths) >= chain.one_sided_rate(bound.paths).abs() * (1 - 1e-12)).all()
    for time, x, y, largest in zip(bound.paths.s, bound.paths.x, bound.paths.y, bound.lipschitz, strict=True):
        for points in (x, y, (x + y) / 2):
            norms = jacobian_norms(lambda z, time=time: model.velocity(z, bound_paths.at(time, z)), points)
            assert float(norms.max()) <= float(largest) * (1 + 1e-12)


@pytest.mark.slow
def test_reported_quadrature_error_covers_the_error():
    """Against a grid four times as fine; and the error falls with the square of the step."""
    oracle = make_distribution("moons")
    model = trained_model("moons", 0)
    rough, middle, fine = (measured(model, oracle, steps=steps) for steps in (32, 64, 256))
    for name in chain.TERMS[:-1]:
        assert abs(rough.values[name] - fine.values[name]) <= rough.errors[name] + fine.errors[name], name
    assert middle.errors["terminal_velocity"] == pytest.approx(rough.errors["terminal_velocity"] / 4, rel=0.3)


@pytest.mark.slow
def test_the_oracle_has_no_error_and_its_loss_is_minus_c():
    oracle = make_distribution("moons")
    bound = measured(oracle, oracle, n=10, steps=16)
    for name in chain.TERMS:
        assert bound.values[name] <= 1e-4 + bound.errors[name], name  # the exact map's own solver: 1e-5
    assert bound.violations() == []
    s, x0, x1 = bound.paths.s, *draws(oracle, 10)
    noise = bound_paths.repaired(x1, len(s))
    weight = 2 * torch.exp(2 * bound_paths.running_integral(bound.lipschitz, s))
    loss = bound_paths.integral(weight * bound_paths.tvm_loss(oracle, x0, noise, s).mean(1), s)
    minimum = bound_paths.integral(weight * bound_paths.flow_matching_minimum(oracle, x0, noise, s).mean(1), s)
    assert bound.constant == pytest.approx(-float(minimum), rel=1e-12)
    assert float(loss) + bound.constant == pytest.approx(0, abs=1e-6 * float(loss))
    assert bound.loss == pytest.approx(bound.loss_minimum, rel=1e-6)


def test_constant_of_one_gaussian_is_its_closed_form():
    """E||v - u||^2 = D sigma^2 / var_s, for v given x_s is Gaussian with that variance."""
    sigma, n, t, rate = 0.5, 20_000, 0.8, 1.5
    oracle = GaussianMixture(torch.tensor([[0.4, -0.3]]), sigma)
    x0, x1 = draws(oracle, n)
    s = time_grid(t, 0.35, 64)
    minimum = bound_paths.flow_matching_minimum(oracle, x0, bound_paths.repaired(x1, len(s)), s)
    exact = -quad(lambda r: 2 * t * math.exp(2 * rate * r) * 2 * sigma**2 / ((1 - r) ** 2 * sigma**2 + r**2), 0, t)[0]
    assert chain.constant(torch.full_like(s, rate), minimum, s) == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(("c", "t"), [(0.8, 0.6), (-0.8, 1.0)], ids=["contracting", "expanding"])
def test_bounds_of_a_linear_field_are_its_exponentials(c, t):
    """u_theta = c x, so m = M = -c and the two-sided rate is |c|; a + b = q at all times."""
    s, q = time_grid(t, 0.5, 256), torch.tensor([0.42, 0.56], dtype=torch.float64)  # ||q|| = 0.7
    x, y, df_ds = torch.randn(3, len(s), 7, 2, dtype=torch.float64)
    paths = bound_paths.Paths(s, x, y, df_ds, c * x, c * y, exact=df_ds - c * x + c * y - q)
    one_sided, two_sided = (0.7 * math.expm1(rate * t) / rate for rate in (-c, abs(c)))
    assert float(chain.pathwise(chain.one_sided_rate(paths), paths).max()) == pytest.approx(one_sided, rel=1e-4)
    assert float(chain.pathwise(chain.two_sided_rate(paths), paths).max()) == pytest.approx(two_sided, rel=1e-4)
    assert chain.mean_square(paths) == pytest.approx(one_sided, rel=1e-4)


def test_eq_7_has_the_factor_t():
    """With ||d/ds f - u|| = r at all times, sqrt(t int_0^t r^2 ds) = t r; without the factor it is sqrt(t) r."""
    s, r = time_grid(0.25, 0.1, 16), 1.3
    zero = torch.zeros(len(s), 5, 2, dtype=torch.float64)
    gap = zero + torch.tensor([0.6 * r, 0.8 * r], dtype=torch.float64)
    paths = bound_paths.Paths(s, zero, zero, gap, zero, zero, zero)
    torch.testing.assert_close(chain.terminal_velocity(paths), torch.full((5,), 0.25 * r, dtype=torch.float64))


class Affine(nn.Module):
    """F(x, t, s) = c x + d."""

    def __init__(self, c: float, d: tuple[float, ...]):
        super().__init__()
        self.c, self.d = c, nn.Parameter(torch.tensor(d, dtype=torch.float64), requires_grad=False)

    def forward(self, x, t, s, condition=None):
        return self.c * x + self.d + 0 * over(s, x)


def test_the_loss_is_eq_9_written_by_hand():
    """With F = c x + d the jump is straight, d/ds f = F; squared norms are sums over dimensions."""
    c, d, t = 0.8, torch.tensor([0.2, 0.6], dtype=torch.float64), 0.7
    x0, x1 = draws(make_distribution("moons"), 5)
    s = time_grid(t, 0.5, 4)
    noise = bound_paths.repaired(x1, len(s))
    x_t, x_s = ((1 - r) * x0 + r * noise for r in (t, s[:, None, None]))  # [S, N, D]
    F = c * x_t + d
    landing = x_t + (s[:, None, None] - t) * F
    jump, flow_matching = F - (c * landing + d), c * x_s + d - (noise - x0)
    expected = jump.square().sum(2) + flow_matching.square().sum(2)
    model = FlowMap(Affine(c, tuple(d.tolist())))
    torch.testing.assert_close(bound_paths.tvm_loss(model, x0, noise, s), expected)


@pytest.mark.parametrize(("c", "t"), [(0.8, 0.6), (-0.8, 1.0)], ids=["contracting", "expanding"])
@pytest.mark.slow
def test_gaussian_data_and_a_linear_network_have_closed_forms(c, t):
    """f = (s - t)(c x + d) and u_theta = c x + d, so m = -c and L = |c|; u and psi of one Gaussian are known."""
    mean, sigma, d = torch.tensor([0.3, -0.5], dtype=torch.float64), 0.8, (0.2, 0.6)
    oracle = GaussianMixture(mean[None], sigma)
    x0, x1 = draws(oracle, 2)
    s = time_grid(t, 0.7, 2048)
    x_t = (1 - t) * x0 + t * x1
    paths = bound_paths.follow(FlowMap(Affine(c, d)), oracle, x_t, s, 0.7)
    found = {name: term.tolist() for name, term in chain.pointwise_terms(paths).items()}

    average = c * x_t + torch.tensor(d, dtype=torch.float64)  # d/ds f
    std = lambda r: math.sqrt((1 - r) ** 2 * sigma**2 + r**2)  # noqa: E731
    direction = (x_t - (1 - t) * mean) / std(t)
    psi = lambda r: (1 - r) * mean + std(r) * direction  # noqa: E731
    u = lambda r: -mean + (r - (1 - r) * sigma**2) / std(r) * direction  # noqa: E731 - d/dr of psi
    a = lambda r, i: (c * (t - r) * average)[i]  # noqa: E731
    b = lambda r, i: (c * psi(r) + torch.tensor(d) - u(r))[i]  # noqa: E731
    both = lambda r, i: float((a(r, i) + b(r, i)).norm())  # noqa: E731
    split = lambda r, i: float(a(r, i).square().sum() + b(r, i).square().sum())  # noqa: E731
    seven = lambda r, i: float((average - u(r))[i].norm()) ** 2  # noqa: E731
    integrate = lambda f: quad(f, 0, t, epsabs=1e-10, limit=200)[0]  # noqa: E731
    total = 0.0
    for i in range(2):
        expected = {
            "displacement": float((x_t - t * average - psi(0))[i].norm()),
            "terminal_velocity": math.sqrt(t * integrate(lambda r, i=i: seven(r, i))),
            "pathwise_one_sided": integrate(lambda r, i=i: math.exp(-c * r) * both(r, i)),
            "pathwise_two_sided": integrate(lambda r, i=i: math.exp(abs(c) * r) * both(r, i)),
        }
        for name, value in expected.items():
            assert found[name][i] == pytest.approx(value, abs=1e-6), name
        total += integrate(lambda r, i=i: 2 * t * math.exp(2 * abs(c) * r) * split(r, i))
    together = integrate(lambda r: math.exp(-c * r) * math.sqrt(sum(both(r, i) ** 2 for i in range(2)) / 2))
    assert chain.mean_square(paths) == pytest.approx(together, abs=1e-6)
    assert chain.global_bound(paths, torch.full_like(s, abs(c))) == pytest.approx(math.sqrt(total / 2), abs=1e-6)


def test_lipschitz_constant_of_a_linear_network_is_its_slope():
    oracle = GaussianMixture(torch.tensor([[0.3, -0.5]]), 0.8)
    bound = measured(FlowMap(Affine(-0.8, (0.2, 0.6))), oracle, n=10, steps=16)
    torch.testing.assert_close(bound.lipschitz, torch.full_like(bound.lipschitz, 0.8), rtol=1e-6, atol=0)
    assert bound.lipschitz_integral == pytest.approx(0.8, rel=1e-6)


@pytest.mark.slow
def test_more_than_two_dimensions():
    bound = measured(random_model(0, dim=4), GaussianMixture(torch.randn(5, 4), 0.5), n=10, steps=8)
    assert bound.violations() == []


def tight_case(L: float, steps: int = 512) -> tuple[bound_paths.Paths, Tensor]:
    """Groenwall, Cauchy-Schwarz and ||a + b||^2 <= 2 ||a||^2 + 2 ||b||^2 as equalities: paths at t = 1, and L(s).

    u_theta = -L x. With p = n e^(-L s), ||n|| = 1, the exact field is u = -L y + p and the model's path has
    dX/ds = -L X - p: a = b = -p push X and Y apart along n, and ||e(0)|| = int e^(L s) ||a + b|| ds = 2.
    Both are linear: Y = e^(L (1 - s)) x - (1 - s) p and X = e^(L (1 - s)) x + (1 - s) p.
    """
    x, n = torch.randn(50, 2, dtype=torch.float64), torch.tensor([0.6, 0.8], dtype=torch.float64)
    s = time_grid(1.0, 0.5, steps)
    rows = []
    for time in s.tolist():
        p, grown = n * math.exp(-L * time), math.exp(L * (1 - time)) * x
        x_s, y_s = grown + (1 - time) * p, grown - (1 - time) * p
        rows.append((x_s, y_s, -L * x_s - p, -L * x_s, -L * y_s, -L * y_s + p))
    return bound_paths.Paths(s, *(torch.stack(column) for column in zip(*rows, strict=True))), torch.full_like(s, L)


def test_theorem_1_is_attained():
    paths, L = tight_case(3.0)
    w2 = wasserstein2(paths.x[0], paths.y[0])
    assert w2 == pytest.approx(2, rel=1e-9)  # the clouds differ by a translation of length 2
    assert float(chain.pathwise(chain.one_sided_rate(paths), paths).max()) == pytest.approx(2, rel=1e-4)
    assert chain.mean_square(paths) == pytest.approx(2, rel=1e-4)
    assert chain.global_bound(paths, L) == pytest.approx(2, rel=1e-4)


WRONG = {  # logs of 2 t exp(int L), and of exp(2 int L), as the paper's squared triangle inequality would have it
    "half the exponent": lambda L, s: math.log(2 * float(s[-1])) + bound_paths.running_integral(L, s),
    "no factor": lambda L, s: 2 * bound_paths.running_integral(L, s),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_wrong_lambda_fails(wrong):
    paths, L = tight_case(3.0)
    w2, error = wasserstein2(paths.x[0], paths.y[0]), 1e-3  # ten times the quadrature error
    assert chain.global_bound(paths, L) >= w2 - error
    assert chain.global_bound(paths, L, wrong) < 0.8 * w2
    fine, _ = tight_case(3.0, 1024)  # no artefact of the grid
    assert chain.global_bound(fine, torch.full_like(fine.s, 3.0), wrong) < 0.8 * w2


def test_eq_7_is_no_link_to_the_global_bound():
    """u = 0 and u_theta = -L(s) x, of a slope H on a stretch of time 1 / H: eq. 7 grows with H, theorem 1 does not."""

    def bounds(slope: float) -> tuple[float, float, float]:
        s = torch.linspace(0, 1, 20_001, dtype=torch.float64)
        L = torch.where((s >= 0.25) & (s < 0.25 + 1 / slope), slope, 0.0).double()
        a, grown = (s > 0.5).double(), bound_paths.running_integral(L, s)
        integral = bound_paths.running_integral(a * grown.exp(), s)
        x = -(integral[-1] - integral) * torch.exp(-grown)  # solves dx/ds = a - L x back from x(1) = 0
        column = {"x": x, "y": 0 * x, "df_ds": a - L * x, "u_x": -L * x, "u_y": 0 * x, "exact": 0 * x}
        paths = bound_paths.Paths(s=s, **{name: value[:, None, None] for name, value in column.items()})
        eq_7 = chain.rms(chain.terminal_velocity(paths))
        return float(chain.rms(chain.displacement(paths))), float(eq_7), float(chain.global_bound(paths, L))

    displacement, eq_7, whole = bounds(20.0)
    steep_displacement, steep_eq_7, steep_whole = bounds(100.0)
    assert displacement < whole < eq_7
    assert steep_eq_7 > 2 * eq_7
    assert steep_displacement == pytest.approx(displacement, rel=0.02)
    assert steep_whole == pytest.approx(whole, rel=0.02)


def test_trapezoids_on_the_graded_grid():
    s = time_grid(0.7, 0.07, 400)
    assert float(s[0]) == 0
    assert float(s[-1]) == 0.7
    assert float(bound_paths.integral(torch.ones_like(s), s)) == pytest.approx(0.7, rel=1e-14)
    assert float(bound_paths.integral(s.cos(), s)) == pytest.approx(math.sin(0.7), abs=1e-4)
    torch.testing.assert_close(bound_paths.running_integral(s, s), s.square() / 2, rtol=1e-12, atol=1e-14)


def test_the_exact_path_is_the_oracle_s_flow_map():
    oracle = make_distribution("two_spirals")
    x, s = draws(oracle, 50)[1], time_grid(0.9, 0.05, 128)
    path = bound_paths.exact_path(oracle, x, s, 0.05)
    for i in (0, 40, 128):
        exact = oracle.jump(x, bound_paths.at(s[-1], x), bound_paths.at(s[i], x))
        assert float((path[i] - exact).norm(dim=1).square().mean().sqrt()) < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [({"t": 0.0}, "start time"), ({"t": 1.5}, "start time"), ({"steps": 7}, "even"), ({"scale": 0.0}, "scale")],
)
def test_bad_settings_raise(options, message):
    with pytest.raises(ValueError, match=message):
        time_grid(**{"t": 1.0, "scale": 0.07, **options})


def test_a_model_that_is_not_finite_raises():
    model = random_model(0)
    nn.init.constant_(model.network.output.bias, math.nan)
    oracle = make_distribution("moons")
    with pytest.raises(FloatingPointError, match="finite"):
        measured(model, oracle, n=10, steps=8)
