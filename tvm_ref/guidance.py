"""Classes and classifier-free guidance (paper, eq. 13 to 15 and appendix F.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tvm_ref.checks import checked_labels, require
from tvm_ref.shapes import Labels, PerSample, Sample, over


class Condition(NamedTuple):
    """The inputs of the network besides x and the times.

    Attributes:
        label: [B] classes 0 to C - 1; C is the null label, "no class".
        beta: [B] inverse guidance weights, beta = 1/w (appendix F.1); 1 is no guidance.
    """

    label: Labels
    beta: PerSample


def draw_beta(
    n: int, w_min: float, w_max: float, *, generator: torch.Generator | None = None, device: torch.device | None = None
) -> PerSample:
    """Draw beta ~ U(1/w_max, 1/w_min) [n] (appendix F.1); w_min = w_max is constant guidance.

    Raises:
        ValueError: unless 0 < w_min <= w_max.
    """
    require(0 < w_min <= w_max, f"guidance weights must satisfy 0 < w_min <= w_max, got {w_min} and {w_max}")
    # uniform in beta = 1/w, not in w: the network is conditioned on beta, which stays within (0, 1]
    u = torch.rand(n, generator=generator, device=device)
    return 1 / w_max + (1 / w_min - 1 / w_max) * u


@checked_labels
def drop_labels(
    condition: Condition, null_label: int, rate: float = 0.1, *, generator: torch.Generator | None = None
) -> Condition:
    """Replace each label by the null label with probability `rate`, and its beta by 1 (sec. 3, "We randomly set c").

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: labels without beta.
    """
    dropped = torch.rand(len(condition.label), generator=generator, device=condition.label.device) < rate
    return without_label(condition, null_label, dropped)


def without_label(condition: Condition, null_label: int, where: Tensor | None = None) -> Condition:
    """Remove the class from a condition (null label, w = 1): for all samples, or where `where` [B] is true."""
    label, beta = condition
    where = torch.ones_like(label, dtype=torch.bool) if where is None else where
    # without a class there is nothing to guide towards, so w = 1 goes with the null label
    return Condition(label.masked_fill(where, null_label), beta.masked_fill(where, 1.0))


def guided_velocity(conditional: Sample, unconditional: Sample, beta: PerSample) -> Sample:
    """Return the guided velocity w u(x, c) + (1 - w) u(x) [B, ...], w = 1/beta (eq. 13).

    With the conditional velocity v for u(x, c) it is the target of eq. 14.
    """
    w = over(1 / beta, conditional)
    # w > 1 goes beyond the conditional velocity, away from the unconditional one
    return w * conditional + (1 - w) * unconditional
