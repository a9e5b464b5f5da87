"""The exact flow along a known velocity (eq. 2): RK4 in a time that is stretched where the velocity changes fast.

Near the data, t below about the width of the narrowest structure, the velocity changes fast. With t = scale sinh(z)
equal steps in z are fine steps in t below `scale` and coarse ones above, so a few dozen steps do for all of [0, 1].
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.flow_map import Flow
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, over

Velocity = Callable[[Sample, Time], Sample]


def rk4_step(velocity: Velocity, x: Sample, z: Time, step: Time, scale: float) -> Sample:
    """Carry x [B, ...] from z [B] to z + step [B] along dx/dt = velocity(x, t), where t = scale sinh(z)."""

    def slope(x: Tensor, z: Tensor) -> Tensor:  # dx/dz = velocity(x, scale sinh z) scale cosh z
        return over(scale * z.cosh(), x) * velocity(x, (scale * z.sinh()).clamp(0, 1))

    # four slopes, an error of step^5; fewer evaluations of the mixture for the same error than Euler or Heun
    h = over(step, x)
    k1 = slope(x, z)
    k2 = slope(x + h / 2 * k1, z + step / 2)
    k3 = slope(x + h / 2 * k2, z + step / 2)
    k4 = slope(x + h * k3, z + step)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def follow(velocity: Velocity, x: Sample, t: Time, s: Time, scale: float, steps: int) -> Sample:
    """Solve for psi(x, t, s) [B, ...] (eq. 2), each sample from its own t to its own s [B], in either direction."""
    z, z_end = ((time.to(x.dtype) / scale).asinh() for time in (t, s))
    step = (z_end - z) / steps  # one per sample, so a batch may hold jumps of all lengths
    for i in range(steps):
        x = rk4_step(velocity, x, z + i * step, step, scale)
    return x


def exact_path(oracle: Flow, x_t: Sample, s: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Solve for Y_s = psi(x_t, t, s) (eq. 2) at every time s [S] from t = s[-1]: [S, N, ...]; a step per interval."""
    path = [x_t]
    for z, z_next in itertools.pairwise((s / scale).asinh().flip(0)):
        y = path[-1]
        now, step = (y.new_full((len(y),), float(a)) for a in (z, z_next - z))
        path.append(rk4_step(lambda y, time: oracle.velocity(y, time, condition), y, now, step, scale))
    return torch.stack(path[::-1])
