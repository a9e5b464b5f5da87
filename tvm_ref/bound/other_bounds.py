"""Bounds from other losses on the error of the same jump, on the same paths; and the slopes of the exact field.

The model's jump from time s to 0 ends at X(x, s, 0) = x - s F(x, s, 0). In the notation of chain.py, with expectations
over points and all as distances, the bounds are

    eulerian      sqrt(t int_0^t E ||rho(s)||^2 ds),   rho = d/ds X(Y_s, s, 0) = u - F - s D F   (2406.07507, prop. 3.8)
    mean_flow     sqrt(t int_0^t L_MF(s, 0) ds),   L_MF the loss of MeanFlow: rho with the random v for u
    lagrangian    sqrt(int_0^t exp(s + 2 int_0^s C) E ||d/ds f - u(X_s, s)||^2 ds)               (2406.07507, prop. 3.7)

X(Y_s, s, 0) is Y_0 at s = 0 and the model's sample X_0 at s = t, so X_0 - Y_0 is the integral of rho for any model:
by Cauchy-Schwarz the Eulerian bound needs no Lipschitz constant (the proposition has e where this has t).
MeanFlow's exceeds it by the noise (grad_x X)(u - v), and needs no oracle: u is the mean of v.

C(s) is the exact field's one-sided Lipschitz constant, the largest -<u(x) - u(y), x - y> / ||x - y||^2. The bound is
Groenwall's for ||e||^2, with 2 <a, e> <= ||a||^2 + ||e||^2; the proposition has the exponential at s = t, of |C|, in
front of the integral, which only loosens it.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from tvm_ref.bound.chain import one_sided_rate, rms, two_sided_rate, weighted_root
from tvm_ref.bound.paths import (
    Draws,
    Paths,
    at,
    integral,
    norms,
    repaired,
    running_integral,
    terminal_velocity_residual,
)
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import MeanFlow
from tvm_ref.shapes import over
from tvm_ref.time_samplers import Times
from tvm_ref.toy.data.mixture import GaussianMixture

LABELS = {
    "eulerian": "Eulerian, exact u",
    "mean_flow": "MeanFlow's loss",
    "lagrangian": "Lagrangian, exact u, one-sided",
}


def eulerian_residual(model: FlowMap, paths: Paths) -> Tensor:
    """Return rho(s) = d/ds X(Y_s, s, 0) [S, N, D], the model's jump to 0 as its start moves along the exact path."""
    rows = []
    for time, y, u in zip(paths.s, paths.y, paths.exact, strict=True):
        s = at(time, y)
        F, DF = model.F_and_total_derivative(y, s, torch.zeros_like(s), u)
        rows.append(u - F - over(s, y) * DF)  # product rule on y - s F(y, s, 0)
    return torch.stack(rows).detach()


def mean_flow_loss(model: FlowMap, draws: Draws, s: Tensor) -> Tensor:
    """Evaluate L_MF(s, 0) of every draw at every time [S, N], by MeanFlow itself, as a sum over dimensions."""
    objective, rows = MeanFlow(model, power=0), []
    for time, noise in zip(s, repaired(draws.x1, len(s)), strict=True):
        now = at(time, draws.x0)
        loss = objective(draws.x0, noise, Times(now, torch.zeros_like(now), now)).jump
        rows.append(draws.x0[0].numel() * loss.detach())
    return torch.stack(rows)


def root_with_time(squares: Tensor, s: Tensor) -> Tensor:
    """Return sqrt(t int_0^t squares ds) [...] of squares [S, ...]: Cauchy-Schwarz over time."""
    return (s[-1] * integral(squares, s)).sqrt()


def slopes(oracle: GaussianMixture, s: Tensor, points: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the largest slope of the exact field over points [N, D] of each time: L(s) and C(s), both [S].

    L is the largest norm of du/dx, C the largest eigenvalue of -du/dx, which is symmetric: the growth, as time runs
    down, of the distance between neighbours. Estimates from below of the field's constants.
    """
    ends = []
    for time, x in zip(s, points, strict=True):
        eigenvalues = torch.linalg.eigvalsh(oracle.velocity_jacobian(x, at(time, x)))  # rising
        ends.append(torch.stack([eigenvalues[:, 0].min(), eigenvalues[:, -1].max()]))
    least, greatest = torch.stack(ends, 1)
    return torch.maximum(-least, greatest), -least


def with_exact_field(oracle: GaussianMixture, paths: Paths) -> Paths:
    """Replace the model's velocity by the exact one at X_s and Y_s: b is zero, and a is d/ds f - u(X_s, s)."""
    u_x = torch.stack([oracle.velocity(x, at(time, x)) for time, x in zip(paths.s, paths.x, strict=True)])
    return replace(paths, u_x=u_x, u_y=paths.exact)


def lagrangian(exact: Paths, C: Tensor) -> float:
    """Return sqrt(int_0^t exp(s + 2 int_0^s C) E ||d/ds f - u(X_s, s)||^2 ds), of with_exact_field and C [S]."""
    log_weight = exact.s + 2 * running_integral(C, exact.s)
    return weighted_root(log_weight, terminal_velocity_residual(exact).square().mean(1), exact.s)


def measure(model: FlowMap, oracle: GaussianMixture, draws: Draws, paths: Paths) -> dict[str, float]:
    """Measure the bounds of a model in float64, on paths that chain.measure followed from the same draws.

    Also returns `exact_lipschitz`, int_0^t L(s) ds of the exact field, over the points that the chain visits.
    """
    exact = with_exact_field(oracle, paths)
    L, C = slopes(oracle, paths.s, (torch.cat([x, y, (x + y) / 2]) for x, y in zip(paths.x, paths.y, strict=True)))
    # the field may be steeper between these points, so include the ratios observed on the paths
    L, C = torch.maximum(L, two_sided_rate(exact).amax(1)), torch.maximum(C, one_sided_rate(exact).amax(1))
    return {
        "eulerian": rms(root_with_time(norms(eulerian_residual(model, paths)).square(), paths.s)),
        "mean_flow": float(root_with_time(mean_flow_loss(model, draws, paths.s).mean(1), paths.s)),
        "lagrangian": lagrangian(exact, C),
        "exact_lipschitz": float(integral(L, paths.s)),
    }


def slope_integral(oracle: GaussianMixture, s: Tensor, half: float = 3.0, side: int = 61) -> tuple[float, int]:
    """Return int_0^t L(s) ds of the exact field over side^2 points of the square |x| <= half, and their number."""
    grid = torch.cartesian_prod(*2 * [torch.linspace(-half, half, side, dtype=torch.float64)])
    return float(integral(slopes(oracle, s, [grid] * len(s))[0], s)), len(grid)
