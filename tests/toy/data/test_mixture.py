import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.networks import some_times
from tvm_ref.guidance import Condition
from tvm_ref.interpolant import interpolate
from tvm_ref.shapes import over
from tvm_ref.toy.data import mixture
from tvm_ref.toy.data.distributions import DISTRIBUTIONS, make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture


def points(oracle: GaussianMixture, n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points x_t [n, 2] of the path at random times [n]."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(n, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, oracle.dim, dtype=torch.float64, generator=generator)
    return interpolate(oracle.sample(n, generator)[0], noise, t), t


def test_points_of_the_unit_cube_map_to_the_distribution():
    """Components by their weights, exactly, and Gaussian noise around them."""
    centres = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 9.0]])
    oracle = GaussianMixture(centres, 0.5, weights=torch.tensor([1.0, 2.0, 5.0]), labels=torch.tensor([0, 1, 1]))
    u = torch.rand(8000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u[:, 0] = (torch.arange(8000) + 0.5) / 8000
    x, label = oracle.from_uniform(u)
    assert torch.equal(label, torch.tensor([0, 1]).repeat_interleave(torch.tensor([1000, 7000])))
    noise = (x - oracle.centres.repeat_interleave(torch.tensor([1000, 2000, 5000]), 0)) / 0.5
    torch.testing.assert_close(torch.special.ndtr(noise), u[:, 1:])


def test_velocity_against_monte_carlo_posterior_mean():
    """E[v | x_t = x] by self-normalised importance sampling over data: x1 = (x - (1 - t) x0) / t, v = x1 - x0."""
    oracle = make_distribution("moons")
    data = oracle.sample(400_000)[0]
    for t in (0.15, 0.5, 0.9):
        x = interpolate(oracle.sample(5)[0], torch.randn(5, 2, dtype=torch.float64), torch.full((5,), t))
        for point in x:
            x1 = (point - (1 - t) * data) / t
            v = x1 - data
            weight = torch.softmax(-0.5 * x1.square().sum(1), 0)
            mean = weight @ v
            error = (weight.square() @ (v - mean).square()).sqrt()
            exact = oracle.velocity(point[None], torch.tensor([t], dtype=torch.float64))[0]
            assert ((exact - mean).abs() < 5 * error).all()


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_score_is_the_gradient_of_log_density_and_gives_the_velocity(name):
    oracle = make_distribution(name)
    x, t = points(oracle, 50)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(oracle.log_density(x, t).sum(), x)
    score = oracle.score(x, t)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-9)
    # E[x1|x] = -t score, and x = (1 - t) E[x0|x] + t E[x1|x], so u = E[x1 - x0|x] = -(x + t score) / (1 - t)
    torch.testing.assert_close(oracle.velocity(x, t), -(x + over(t, x) * score) / over(1 - t, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["moons", "eight_gaussians", "pinwheel"])
def test_the_variance_of_v_is_that_of_the_divergence_of_the_velocity(name):
    """grad E[x0 | x] = Cov(x0 | x) (1 - t) / t^2, and v = (x - x0) / t, so Cov(v | x) = (I - t grad u) / (1 - t)."""
    oracle = make_distribution(name)
    x, t = points(oracle, 50)
    variance = oracle.velocity_variance(x, t)
    x.requires_grad_()
    divergence = sum(torch.autograd.grad(oracle.velocity(x, t)[:, d].sum(), x)[0][:, d] for d in range(2))
    torch.testing.assert_close(variance, (2 - t * divergence) / (2 * (1 - t)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["moons", "checkerboard"])
def test_the_jacobian_of_the_velocity_is_that_of_autograd(name):
    """In and between the modes, over [0, 1], both ends included; of a class, too."""
    oracle = make_distribution(name)
    x, t = points(oracle, 60)
    x, t = torch.cat([x, 4 * torch.rand(60, 2) - 2]).double(), t.repeat(2)
    t[:2] = torch.tensor([0.0, 1.0])
    jacobian = torch.func.jacrev(lambda x: oracle.velocity(x, t).sum(0))(x)
    torch.testing.assert_close(oracle.velocity_jacobian(x, t), jacobian.transpose(0, 1), rtol=1e-9, atol=1e-9)
    classes = make_distribution("circles")
    condition = Condition(label := torch.arange(120) % 2, torch.ones(120))
    jacobian = torch.func.jacrev(lambda x: classes.velocity(x, t, condition).sum(0))(x)
    torch.testing.assert_close(classes.velocity_jacobian(x, t, label), jacobian.transpose(0, 1), rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one_and_satisfies_the_continuity_equation():
    """d/dt p + div(p u) = 0, by automatic differentiation."""
    oracle = make_distribution("eight_gaussians")
    axis = torch.linspace(-4, 4, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    total = oracle.log_density(grid, torch.full((len(grid),), 0.3)).exp().sum() * (8 / 400) ** 2
    assert float(total) == pytest.approx(1, abs=1e-6)

    x, t = points(oracle, 20)
    x.requires_grad_()
    t.requires_grad_()
    density = oracle.log_density(x, t).exp()
    flux = density[:, None] * oracle.velocity(x, t)
    (rate,) = torch.autograd.grad(density.sum(), t, retain_graph=True)
    divergence = sum(torch.autograd.grad(flux[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    torch.testing.assert_close(rate, -divergence, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.slow
def test_flow_map_inverts_composes_and_follows_the_velocity(name):
    oracle, n = make_distribution(name), 100
    x1 = torch.randn(n, 2, dtype=torch.float64)
    one, half, zero = torch.ones(n), torch.full((n,), 0.5), torch.zeros(n)
    y = oracle.jump(x1, one, zero)
    assert float((oracle.jump(y, zero, one) - x1).norm(dim=1).max()) < 1e-5  # its own inverse
    two = oracle.jump(oracle.jump(x1, one, half), half, zero)  # semigroup
    assert float((two - y).norm(dim=1).max()) < 1e-4
    t, s = some_times(n)
    s = s.clamp(0.02, 0.98)
    t = torch.maximum(t, s)
    h = 1e-5
    rate = (oracle.jump(x1, t, s + h) - oracle.jump(x1, t, s - h)) / (2 * h)  # eq. 6
    f, df_ds = oracle.displacement_and_terminal_velocity(x1, t, s)
    torch.testing.assert_close(df_ds, rate, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(f, oracle.displacement(x1, t, s))
    assert torch.equal(oracle.jump(x1, t, t), x1)


@pytest.mark.slow
def test_solver_converges_with_order_four(monkeypatch):
    oracle = make_distribution("swiss_roll")
    x1 = torch.randn(200, 2, dtype=torch.float64)

    def solve(steps: int) -> Tensor:
        monkeypatch.setattr(mixture, "RK4_STEPS", steps)
        return oracle.jump(x1, torch.ones(200), torch.zeros(200))

    exact = solve(1024)
    errors = [float((solve(n) - exact).norm(dim=1).median()) for n in (32, 128)]
    assert math.log(errors[0] / errors[1]) / math.log(4) == pytest.approx(4, abs=0.4)


def test_one_gaussian_has_a_flow_in_closed_form():
    """psi(x, t, s) = (1 - s) m + (std(s) / std(t)) (x - (1 - t) m), std(t)^2 = (1 - t)^2 sigma^2 + t^2."""
    m, sigma = torch.tensor([[0.7, -0.2, 0.4]], dtype=torch.float64), 0.3
    oracle = GaussianMixture(m, sigma)
    x = torch.randn(50, 3, dtype=torch.float64)
    t, s = some_times(50)
    std_t, std_s = (((1 - a) ** 2 * sigma**2 + a**2).sqrt()[:, None] for a in (t, s))
    expected = over(1 - s, x) * m + std_s / std_t * (x - over(1 - t, x) * m)
    torch.testing.assert_close(oracle.jump(x, t, s), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.slow
def test_flow_map_carries_noise_density_to_data_density():
    """log p_1(x) = log p_0(psi(x)) + log |det d psi / dx|."""
    oracle, n = make_distribution("pinwheel"), 30
    x1 = 0.8 * torch.randn(n, 2, dtype=torch.float64)
    one, zero, h = torch.ones(n), torch.zeros(n), 1e-5
    shifts = [torch.tensor(e, dtype=torch.float64) for e in ([h, 0], [0, h])]
    columns = [(oracle.jump(x1 + e, one, zero) - oracle.jump(x1 - e, one, zero)) / (2 * h) for e in shifts]
    log_det = torch.linalg.det(torch.stack(columns, -1)).abs().log()
    y = oracle.jump(x1, one, zero)
    torch.testing.assert_close(oracle.log_density(y, zero) + log_det, oracle.log_density(x1, one), rtol=0, atol=2e-3)


def test_classes_are_the_mixtures_of_their_own_components():
    oracle = make_distribution("moons")
    x, t = points(oracle, 40)
    label = torch.arange(40) % 3  # 2 means "no class"
    condition = Condition(label, torch.ones(40))
    for c in (0, 1):
        own = GaussianMixture(oracle.centres[oracle.labels == c], oracle.sigma)
        rows = label == c
        torch.testing.assert_close(oracle.velocity(x, t, condition)[rows], own.velocity(x[rows], t[rows]))
        torch.testing.assert_close(oracle.log_density(x, t, label)[rows], own.log_density(x[rows], t[rows]))
        torch.testing.assert_close(oracle.velocity_variance(x, t, label)[rows], own.velocity_variance(x[rows], t[rows]))
    torch.testing.assert_close(oracle.velocity(x, t, condition)[label == 2], oracle.velocity(x, t)[label == 2])


def test_guided_velocity_and_its_flow():
    oracle = make_distribution("moons")
    x, t = points(oracle, 40)
    label, w = torch.arange(40) % 2, 2.5
    guided = oracle.velocity(x, t, Condition(label, torch.full((40,), 1 / w)))
    one = oracle.velocity(x, t, Condition(label, torch.ones(40)))
    torch.testing.assert_close(guided, w * one + (1 - w) * oracle.velocity(x, t), rtol=1e-6, atol=1e-6)
    condition = Condition(label, torch.full((40,), 1 / w, dtype=torch.float64))
    s = 0.5 * t
    f, df_ds = oracle.displacement_and_terminal_velocity(x, t, s, condition)
    torch.testing.assert_close(df_ds, oracle.velocity(x + f, s, condition))


class Largest(TorchDispatchMode):
    """Sees how many numbers the largest tensor has."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, result.numel() if isinstance(result, Tensor) else 0)
        return result


def test_chunks_change_nothing_but_the_memory(monkeypatch):
    oracle = make_distribution("moons")
    x, t = points(oracle, 100)
    label = torch.arange(100) % 3
    whole = oracle.velocity(x, t, Condition(label, torch.full((100,), 0.5))), oracle.log_density(x, t, label)
    monkeypatch.setattr(mixture, "MAX_PAIRS", 7 * len(oracle.centres))
    with Largest() as largest:
        parts = oracle.velocity(x, t, Condition(label, torch.full((100,), 0.5))), oracle.log_density(x, t, label)
    assert largest.numbers == 7 * len(oracle.centres)
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-12)


def test_far_points_and_ends_of_time_are_finite():
    oracle = make_distribution("checkerboard")
    x = torch.tensor([[50.0, -50.0], [0.0, 0.0], [1e3, 1e3]])
    for time in (0.0, 1e-6, 1.0):
        t = torch.full((3,), time)
        assert torch.isfinite(oracle.velocity(x, t)).all()
        assert torch.isfinite(oracle.score(x, t)).all()


def test_samples_have_the_mixture_s_classes_and_moments():
    oracle = make_distribution("circles")
    x, label = oracle.sample(50_000, torch.Generator().manual_seed(0))
    assert x.dtype == torch.float64
    assert float((label == 0).double().mean()) == pytest.approx(0.5, abs=0.01)
    torch.testing.assert_close(x.mean(0), torch.zeros(2).double(), rtol=0, atol=0.02)
    torch.testing.assert_close(x.var(0), torch.ones(2).double(), rtol=0, atol=0.02)
    outer = x[label == 0].norm(dim=1).mean() / x[label == 1].norm(dim=1).mean()
    assert float(outer) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), 0.1), "centres"),
        ((torch.zeros(0, 2), 0.1), "centres"),
        ((torch.full((3, 2), float("nan")), 0.1), "centres"),
        ((torch.zeros(3, 2), 0.0), "sigma"),
        ((torch.zeros(3, 2), float("nan")), "sigma"),
        ((torch.zeros(3, 2), 0.1, torch.zeros(3)), "weights"),
        ((torch.zeros(3, 2), 0.1, None, torch.zeros(2)), "labels"),
    ],
)
def test_bad_mixtures_raise(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


@pytest.mark.bad_shapes
def test_bad_calls_raise():
    oracle = make_distribution("checkerboard")
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="shape"):
        oracle.velocity(x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        oracle.jump(x, torch.ones(3), torch.full((3,), -0.5))
    with pytest.raises(ValueError, match="no class labels"):
        oracle.velocity(x, torch.zeros(3), Condition(torch.zeros(3, dtype=torch.long), torch.ones(3)))
