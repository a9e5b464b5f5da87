"""At the exact flow map: whose expected gradient is zero, and how far the others are from it.

Data are Gaussian, where map, velocity and expectations are in closed form; a gradient is functional, paired with four
test functions of (x, t, s), and an expectation is a quadrature over (x0, x1) given x_t that is exact (exact.py).
"""

import math

import pytest
import torch
from torch import Tensor

from tests.objectives.exact import WEIGHTS, GaussianData, TwoPoints, expected_gradient, probes
from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import (
    ESD,
    LSD,
    PID,
    PSD,
    TVM,
    AlphaFlow,
    ContinuousConsistency,
    FlowMatching,
    ImprovedMeanFlow,
    MeanFlow,
    Shortcut,
    SoFlow,
)
from tvm_ref.time_samplers import Times

STATIONARY = {
    "tvm": (TVM, {}),
    "tvm, eq. 9": (TVM, {"detach_landing": False}),
    "tvm, JVP detached": (TVM, {"detach_jvp": True}),
    "pid": (PID, {}),
    "fm": (FlowMatching, {}),
    **{f"lsd {stops}": (LSD, {"stops": stops}) for stops in LSD.STOPS},
    **{f"esd {stops}": (ESD, {"stops": stops}) for stops in ESD.STOPS},
    **{f"psd {split} {stops}": (PSD, {"split": split, "stops": stops}) for split in PSD.SPLITS for stops in PSD.STOPS},
    "meanflow, no weight": (MeanFlow, {"power": 0}),
    "imf, no weight": (ImprovedMeanFlow, {"power": 0}),
    "sct, not normalised": (ContinuousConsistency, {"constant": None}),
    "alphaflow at alpha 0, no weight": (AlphaFlow, {"alpha": 0.0, "power": 0}),
}


def solution() -> tuple[GaussianData, FlowMap, FlowMap]:
    """The exact flow map as a model, and the same, frozen, as the target."""
    data = GaussianData()
    model = FlowMap(data)
    return data, model, EMA(model, 0).module


def test_the_exact_map_is_exact():
    """It obeys d/ds psi = u(psi, s) and F(x, t, t) = E[v | x_t = x], by central differences and by quadrature."""
    data, model, _ = solution()
    x, (t, s, _) = probes()
    x, h = x[:, None], 1e-5
    slope = (model.jump(x, t, s + h) - model.jump(x, t, s - h)) / (2 * h)
    torch.testing.assert_close(slope, model.velocity(model.jump(x, t, s), s), rtol=1e-8, atol=1e-8)
    x0 = data.data_given(x[:, 0], t)
    v = (x[:, 0] - x0) / t
    torch.testing.assert_close(model.velocity(x, t)[:, 0], (WEIGHTS[:, None] * v).sum(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("where", ["jumps", "diagonal"])
@pytest.mark.parametrize("name", STATIONARY)
def test_the_exact_flow_map_is_a_stationary_point(name, where):
    kind, options = STATIONARY[name]
    data, model, target = solution()
    x, times = probes()
    if where == "diagonal":
        times = times._replace(s=times.t)
    if kind is PID:  # every jump starts at t = 1, so there x is
        times = times._replace(t=torch.ones_like(x), s_prime=torch.ones_like(x))
    gradient = expected_gradient(kind(model, **options), data, x, times, target)
    assert float(gradient.abs().max()) < 1e-12


def test_stationarity_sees_a_map_that_is_wrong():
    """The same with the exact map of other Gaussian data: every gradient is far from zero."""
    data, model, _ = solution()
    x, times = probes()
    truth = GaussianData()
    data.m, data.sigma, data.data_given = 0.5, 0.6, truth.data_given
    for name, (kind, options) in STATIONARY.items():
        t = torch.ones_like(x) if kind is PID else times.t
        gradient = expected_gradient(
            kind(model, **options), data, x, times._replace(t=t, s_prime=t), EMA(model, 0).module
        )
        diagonal_only = kind in (LSD, ESD, PSD)  # their jumps agree with the map's own velocity; the diagonal does not
        if diagonal_only:
            assert float(gradient.abs().max()) < 1e-12, name
            gradient = expected_gradient(
                kind(model, **options), data, x, times._replace(s=times.t), EMA(model, 0).module
            )
        assert float(gradient.abs().max()) > 1e-2, name


def test_shortcut_is_exact_down_to_its_shortest_jumps_and_of_first_order_there():
    data, model, target = solution()
    x = probes()[0]
    start = torch.full_like(x, 0.75)
    biases = []
    for steps in (16, 32, 64, 128):
        objective = Shortcut(model, steps=steps)
        long = expected_gradient(objective, data, x, Times(start, start - 0.5, start), target)
        assert float(long.abs().max()) < 1e-12
        biases.append(
            float(expected_gradient(objective, data, x, Times(start, start - 2 / steps, start), target).norm())
        )
    assert math.log2(biases[0] / biases[-1]) / 3 == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("kind", ["alphaflow", "soflow"])
def test_finite_steps_have_a_bias_of_first_order(kind):
    data, model, target = solution()
    x, times = probes()
    alphas = [2.0**-k for k in (5, 7, 9, 11)]
    values = []
    for alpha in alphas:
        if kind == "alphaflow":
            objective = AlphaFlow(model, alpha=alpha, power=0)
        else:
            objective = SoFlow(model, first=alpha, last=alpha, power=0)
        values.append(float(expected_gradient(objective, data, x, times, target).norm()))
    assert values[0] > 1e-3
    slope = math.log(values[0] / values[-1]) / math.log(alphas[0] / alphas[-1])
    assert slope == pytest.approx(1, abs=0.03)


SKEWED = TwoPoints(torch.tensor([[-1.0], [1.0]]), (0.8, 0.2))  # at x_t = .2 and t = .8: v is 1.5 or -1, E v = .948
X, T = torch.tensor([[0.2]], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64)


class Shifted(torch.nn.Module):
    """F = E v + offset."""

    def __init__(self, offset: float):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.tensor([offset], dtype=torch.float64))

    def forward(self, x, t, s, condition=None):
        return SKEWED.velocity(X, T) + self.offset + 0 * x * t[:, None] * s[:, None]


def slope(make, offset: float, s: Tensor = T) -> float:
    """The derivative of an objective's expected loss in the offset, by enumerating both velocities."""
    network, both = Shifted(offset), T.expand(2)
    x1 = (X - 0.2 * SKEWED.points) / 0.8
    terms = make(FlowMap(network))(SKEWED.points, x1, Times(both, s.expand(2), both))
    return float(torch.autograd.grad((SKEWED.posterior(X, T)[0] * terms.total).sum(), network.offset)[0])


@pytest.mark.parametrize("kind", [MeanFlow, ImprovedMeanFlow, AlphaFlow])
def test_adaptive_weights_move_the_solution_of_skewed_data(kind):
    """With p = 1 and eps = 1e-3 the mean of (F - v) / ((F - v)^2 + eps) is zero next to the likelier v instead."""
    mean = float(SKEWED.velocity(X, T))
    assert mean == pytest.approx(0.948, abs=5e-4)
    assert abs(slope(lambda model: kind(model, power=0), 0.0)) < 1e-12

    def weighted(value: float) -> float:
        return slope(lambda model: kind(model, power=1), value - mean)

    assert weighted(mean) < -0.05  # far from the weighted minimum, which lies above
    low, high = 1.2, float(SKEWED.velocities(X, T)[0, 0])
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if weighted(middle) < 0 else (low, middle)
    assert 1.49 < low < 1.5


def test_normalised_tangents_move_the_solution_of_skewed_data():
    """Likewise for g / (||g|| + c), at s = 0."""
    for constant, moved in ((None, False), (0.1, True)):
        found = slope(lambda model, c=constant: ContinuousConsistency(model, constant=c), 0.0, 0 * T)
        assert abs(found) > 0.1 if moved else abs(found) < 1e-12


def test_probes_meet_their_interpolant():
    """Each node (x0, x1) has x_t = x, and v is the velocity that data_given implies."""
    data = GaussianData()
    x, (t, _, _) = probes()
    x0 = data.data_given(x, t)
    x1 = (x - (1 - t) * x0) / t
    for k in range(len(x0)):
        torch.testing.assert_close(interpolate(x0[k, :, None], x1[k, :, None], t)[:, 0], x)
        torch.testing.assert_close(conditional_velocity(x0[k], x1[k]), (x - x0[k]) / t)
