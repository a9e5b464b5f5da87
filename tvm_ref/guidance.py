"""Classes and classifier-free guidance (paper, eq. 13 to 15 and appendix F.1)."""

from typing import NamedTuple

import torch
from torch import Tensor

from tvm_ref.shapes import Labels, PerSample, Sample, over


class Condition(NamedTuple):
    """What the network is conditioned on beside the times.

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
    if not 0 < w_min <= w_max:
        raise ValueError(f"guidance weights must satisfy 0 < w_min <= w_max, got {w_min} and {w_max}")
    u = torch.rand(n, generator=generator, device=device)
    return 1 / w_max + (1 / w_min - 1 / w_max) * u


def drop_labels(
    condition: Condition, null_label: int, rate: float = 0.1, *, generator: torch.Generator | None = None
) -> Condition:
    """Replace each label by the null label with probability `rate`, and its beta by 1 (sec. 3, "We randomly set c").

    Raises:
        ValueError: a rate outside [0, 1].
        TypeError: labels without beta.
    """
    if not isinstance(condition, Condition):
        raise TypeError(f"drop_labels takes Condition(label, beta), got {type(condition).__name__}")
    if not 0 <= rate <= 1:
        raise ValueError(f"the label dropout rate must lie in [0, 1], got {rate}")
    label, beta = condition
    dropped = torch.rand(len(label), generator=generator, device=label.device) < rate
    return without_label(Condition(label, beta), null_label, dropped)


def without_label(condition: Condition, null_label: int, where: Tensor | None = None) -> Condition:
    """Take the class from a condition (label null, w = 1): for all samples, or where `where` [B] is true."""
    label, beta = condition
    where = torch.ones_like(label, dtype=torch.bool) if where is None else where
    return Condition(label.masked_fill(where, null_label), beta.masked_fill(where, 1.0))


def guided_velocity(conditional: Sample, unconditional: Sample, beta: PerSample) -> Sample:
    """Return the guided velocity w u(x, c) + (1 - w) u(x) [B, ...], w = 1/beta (eq. 13).

    With the conditional velocity v for u(x, c) it is the target of eq. 14.
    """
    w = over(1 / beta, conditional)
    return w * conditional + (1 - w) * unconditional
