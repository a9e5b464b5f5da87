"""Where a model and the exact flow carry the same points, and integrals over the times in between."""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tvm_ref.guidance import Condition
from tvm_ref.objectives import Flow
from tvm_ref.shapes import Sample, Time

STEPS = 128  # intervals of the time grid
Watch = Callable[[Iterable[Any], str], Iterable[Any]]  # a loop over times and its name to the loop with a progress bar


def unwatched(times: Iterable[Any], name: str) -> Iterable[Any]:
    """No progress bar."""
    return times


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
    """

    s: Tensor
    x: Tensor
    y: Tensor
    df_ds: Tensor
    u_x: Tensor
    u_y: Tensor
    exact: Tensor

    def thinned(self) -> "Paths":
        """Every second time, for an error estimate; the number of intervals must be even."""
        return Paths(*(getattr(self, name)[::2] for name in self.__dataclass_fields__))


def time_grid(t: float, scale: float, steps: int = STEPS) -> Tensor:
    """Times from 0 to t [steps + 1], uniform in z with s = scale sinh(z): fine near 0, where the field changes fast.

    Raises:
        ValueError: a time outside (0, 1], a scale that is not positive, a number of steps that is not even.
    """
    if not 0 < t <= 1:
        raise ValueError(f"the start time t must lie in (0, 1], got {t}")
    if not scale > 0:
        raise ValueError(f"the scale of the time grid must be positive, got {scale}")
    if steps < 4 or steps % 2:
        raise ValueError(f"the time grid needs an even number of steps, at least 4, got {steps}")
    s = scale * torch.linspace(0, math.asinh(t / scale), steps + 1, dtype=torch.float64).sinh()
    s[-1] = t
    return s


def integral(values: Tensor, s: Tensor) -> Tensor:
    """int_0^t values ds over the first axis, by the trapezoidal rule: [S, ...] to [...]."""
    return torch.trapezoid(values, s, dim=0)


def running_integral(values: Tensor, s: Tensor) -> Tensor:
    """int_0^s values dr at every time [S, ...], by the trapezoidal rule."""
    return torch.cat([torch.zeros_like(values[:1]), torch.cumulative_trapezoid(values, s, dim=0)])


def at(time: Tensor, x: Sample) -> Time:
    """One time for every sample of x: [] to [N], with memory of its own, as a JVP in it needs."""
    return x.new_full((len(x),), float(time))


def exact_path(oracle: Flow, x_t: Sample, s: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Y_s = psi(x_t, t, s) (eq. 2) at every time s [S] from t = s[-1]: [S, N, ...]; one RK4 step in z per interval."""

    def slope(y: Tensor, z: Tensor) -> Tensor:  # dy/dz = u(y, scale sinh z) scale cosh z
        time = (scale * z.sinh()).clamp(0, float(s[-1]))
        return scale * z.cosh() * oracle.velocity(y, at(time, y), condition)

    path = [x_t]
    for z, z_next in itertools.pairwise((s / scale).asinh().flip(0)):
        y, h = path[-1], z_next - z
        k1 = slope(y, z)
        k2 = slope(y + h / 2 * k1, z + h / 2)
        k3 = slope(y + h / 2 * k2, z + h / 2)
        k4 = slope(y + h * k3, z_next)
        path.append(y + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.stack(path[::-1])


def follow(
    model: Flow,
    oracle: Flow,
    x_t: Sample,
    s: Tensor,
    scale: float,
    condition: Condition | None = None,
    watch: Watch = unwatched,
) -> Paths:
    """Both paths from points x_t [N, ...] at time t = s[-1], and the velocities along them."""
    y = exact_path(oracle, x_t, s, scale, condition)
    t = at(s[-1], x_t)
    rows = []
    for time, y_s in watch(list(zip(s, y, strict=True)), "paths"):
        now = at(time, x_t)
        f, df_ds = model.displacement_and_terminal_velocity(x_t, t, now, condition)
        x_s = x_t + f
        u_x, u_y = model.velocity(x_s, now, condition), model.velocity(y_s, now, condition)
        rows.append((x_s, df_ds, u_x, u_y, oracle.velocity(y_s, now, condition)))
    x, df_ds, u_x, u_y, exact = (torch.stack(column).detach() for column in zip(*rows, strict=True))
    return Paths(s, x, y, df_ds, u_x, u_y, exact)


def norms(a: Tensor) -> Tensor:
    """||a|| of every sample at every time: [S, N, ...] to [S, N]."""
    return a.flatten(2).norm(dim=2)


def displacement_error(paths: Paths) -> Tensor:
    """e(s) = ||X_s - Y_s|| [S, N] (eq. 5)."""
    return norms(paths.x - paths.y)


def terminal_velocity_residual(paths: Paths) -> Tensor:
    """a(s) = ||d/ds f(x_t, t, s) - u_theta(X_s, s)|| [S, N] (the first term of eq. 9, before the square)."""
    return norms(paths.df_ds - paths.u_x)


def flow_matching_residual(paths: Paths) -> Tensor:
    """b(s) = ||u_theta(Y_s, s) - u(Y_s, s)|| [S, N] (the second term of eq. 9, less its minimum)."""
    return norms(paths.u_y - paths.exact)
