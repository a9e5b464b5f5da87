"""The parts of the Wasserstein bound: the model's path and the exact one, their residuals, the loss, integrals."""

import copy
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvm_ref.checks import require
from tvm_ref.exact_flow import exact_path
from tvm_ref.flow_map import Flow
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives import TVM
from tvm_ref.shapes import PerSample, Sample, Time
from tvm_ref.time_samplers import Times

STEPS = 128  # intervals of the time grid


class Draws(NamedTuple):
    """Data x0 and noise x1 [N, ...] that the bound is measured on, in float64."""

    x0: Sample
    x1: Sample

    def at(self, time: Tensor) -> Sample:
        """Return x_t = (1 - t) x0 + t x1 [N, ...] at a time t []."""
        return interpolate(self.x0, self.x1, at(time, self.x0))


@dataclass(frozen=True)
class Paths:
    """The model's path and the exact one from the same points, at times s: each [S, N, ...], in float64.

    Attributes:
        s: [S] rising times from 0 to t.
        x: X_s.
        y: Y_s.
        df_ds: d/ds f(x_t, t, s).
        u_x: u_theta(X_s, s).
        u_y: u_theta(Y_s, s).
        exact: u(Y_s, s).

    Raises:
        FloatingPointError: a model's path that is not finite.
    """

    s: Tensor
    x: Tensor
    y: Tensor
    df_ds: Tensor
    u_x: Tensor
    u_y: Tensor
    exact: Tensor

    def __post_init__(self) -> None:
        if not all(bool(torch.isfinite(a).all()) for a in (self.x, self.df_ds, self.u_x, self.u_y)):
            raise FloatingPointError("the model's path is not finite")

    def thinned(self) -> "Paths":
        """Keep every second time, for an error estimate; the number of intervals must be even."""
        return Paths(*(getattr(self, name)[::2] for name in self.__dataclass_fields__))


def time_grid(t: float, scale: float, steps: int = STEPS) -> Tensor:
    """Space times from 0 to t [steps + 1] evenly in z, s = scale sinh(z): fine near 0, where the field changes fast.

    Raises:
        ValueError: a time outside (0, 1], a scale that is not positive, a number of steps that is not even.
    """
    require(0 < t <= 1, f"the start time t must lie in (0, 1], got {t}")
    require(scale > 0, f"the scale of the time grid must be positive, got {scale}")
    require(steps >= 4 and steps % 2 == 0, f"the time grid needs an even number of steps, at least 4, got {steps}")
    # near s = 0 the exact field changes within a time of about `scale`, the width of the data's modes
    s = scale * torch.linspace(0, math.asinh(t / scale), steps + 1, dtype=torch.float64).sinh()
    s[-1] = t  # exactly: sinh(asinh(.)) rounds
    return s


def integral(values: Tensor, s: Tensor) -> Tensor:
    """Integrate values [S, ...] over the first axis, int_0^t values ds, by the trapezoidal rule: [...]."""
    return torch.trapezoid(values, s, dim=0)


def running_integral(values: Tensor, s: Tensor) -> Tensor:
    """Integrate values [S, ...] up to every time, int_0^s values dr, by the trapezoidal rule: [S, ...]."""
    return torch.cat([torch.zeros_like(values[:1]), torch.cumulative_trapezoid(values, s, dim=0)])


def at(time: Tensor, x: Sample) -> Time:
    """Repeat a time for every sample of x: [] to [N], with its own memory, as a JVP needs."""
    return x.new_full((len(x),), float(time))


def follow(model: Flow, oracle: Flow, x_t: Sample, s: Tensor, scale: float) -> Paths:
    """Follow both paths from points x_t [N, ...] at time t = s[-1], with the velocities along them."""
    t, rows = at(s[-1], x_t), []
    for time, y_s in zip(s, exact_path(oracle, x_t, s, scale), strict=True):
        now = at(time, x_t)
        f, df_ds = model.displacement_and_terminal_velocity(x_t, t, now)
        x_s = x_t + f  # one jump from the same start to each s: no errors accumulate (eq. 3)
        # the model's field on both paths: their difference is what drives them apart
        u_x, u_y = model.velocity(x_s, now), model.velocity(y_s, now)
        rows.append((x_s, y_s, df_ds, u_x, u_y, oracle.velocity(y_s, now)))
    return Paths(s, *(torch.stack(column).detach() for column in zip(*rows, strict=True)))


def in_float64(model: Flow) -> Flow:
    """Copy a network in float64, so that rounding does not enter differences between paths; leave other flows."""
    return copy.deepcopy(model).double().requires_grad_(False) if isinstance(model, nn.Module) else model


def norms(a: Tensor) -> Tensor:
    """Take the norm ||a|| of every sample at every time: [S, N, ...] to [S, N]."""
    return a.flatten(2).norm(dim=2)


def displacement_error(paths: Paths) -> Tensor:
    """Return ||e(s)|| = ||X_s - Y_s|| [S, N] (eq. 5)."""
    return norms(paths.x - paths.y)


def terminal_velocity_residual(paths: Paths) -> Tensor:
    """Return ||a(s)|| = ||d/ds f(x_t, t, s) - u_theta(X_s, s)|| [S, N] (the first term of eq. 9, before the square)."""
    return norms(paths.df_ds - paths.u_x)


def flow_matching_residual(paths: Paths) -> Tensor:
    """Return ||b(s)|| = ||u_theta(Y_s, s) - u(Y_s, s)|| [S, N] (the second term of eq. 9, less its minimum)."""
    return norms(paths.u_y - paths.exact)


def solver_error(oracle: Flow, paths: Paths, scale: float) -> PerSample:
    """Return how far Y_0 moves [N] when the exact flow is solved in half as many steps."""
    coarse = exact_path(oracle, paths.y[-1], paths.s[::2], scale)[0]
    return (coarse - paths.y[0]).flatten(1).norm(dim=1)


def repaired(x1: Sample, times: int, seed: int = 0) -> Tensor:
    """Shuffle noise x1 anew for every time, [times, N, ...], so that with fixed x0 each time has its own draws.

    Errors of the mean then average out over times as well as over samples.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([x1[torch.randperm(len(x1), generator=generator)] for _ in range(times)])


def tvm_loss(model: Flow, x0: Sample, x1: Tensor, s: Tensor) -> Tensor:
    """Evaluate L_TVM(t, s) (eq. 9) of every draw at every time [S, N], t = s[-1], by TVM itself; see `repaired`.

    The objective's squared norms are means over a sample's elements; the theorem's are sums.

    Args:
        model: a FlowMap, or another Flow.
        x0: data [N, ...].
        x1: noise at every time [S, N, ...].
        s: [S] times, of the jump's end and of the flow-matching term.
    """
    objective = TVM(model, detach_landing=False)  # eq. 9 has no stop-gradient, and the model is its own target
    t = at(s[-1], x0)
    rows = []
    for time, noise in zip(s, x1, strict=True):
        now = at(time, x0)
        rows.append(objective(x0, noise, Times(t, now, now), target=model).total.detach())
    return x0[0].numel() * torch.stack(rows)


def flow_matching_minimum(oracle: Flow, x0: Sample, x1: Tensor, s: Tensor) -> Tensor:
    """Return ||v - u(x_s, s)||^2 of every draw of tvm_loss [S, N]: the minimum of eq. 1."""
    rows = []
    for time, noise in zip(s, x1, strict=True):
        now = at(time, x0)
        # v is random given x_s: no function of x_s is closer to it than its mean u
        error = conditional_velocity(x0, noise) - oracle.velocity(interpolate(x0, noise, now), now)
        rows.append(error.flatten(1).square().sum(1))
    return torch.stack(rows)
