"""Distributions of training times: the paper's four (sec. 7.3), sampled exactly, and those of related methods."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tvm_ref.checks import require, require_one_of
from tvm_ref.shapes import Time

Normal = tuple[float, float]  # mean and standard deviation of logit(time)


class Times(NamedTuple):
    """Times of one batch, all [B], with 0 <= s <= t <= 1.

    Attributes:
        t: where jumps start.
        s: where jumps end.
        s_prime: where flow matching is done: TVM's second term, and samples with t = s. Equal to s in
            trunc, clamp and gap, to t in sorted; the others draw it independently.
    """

    t: Time
    s: Time
    s_prime: Time


def logit_normal(u: Tensor, normal: Normal, upper: Tensor | None = None) -> Tensor:
    """Map uniform u [n] to times [n]: sigmoid(z), z ~ N(mean, std^2), truncated to (0, upper] if `upper` [n] is given.

    Inverse-CDF sampling: to truncate, u is scaled by the CDF at `upper`. The result is exact, and smooth in u.
    """
    mean, std = normal
    u = u.clamp_min(torch.finfo(u.dtype).tiny)
    if upper is None:
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    bound = torch.special.ndtr((torch.logit(upper) - mean) / std)
    return torch.minimum(torch.sigmoid(mean + std * torch.special.ndtri(u * bound)), upper)


# Each sampler maps uniform numbers u [3, n] (float64) to times [n].


def trunc(u: Tensor, t: Normal, s: Normal) -> Times:
    """Draw t, then s truncated to s <= t (sec. 7.3)."""
    start = logit_normal(u[0], t)
    end = logit_normal(u[1], s, start)
    return Times(start, end, end)


def clamp(u: Tensor, t: Normal, s: Normal) -> Times:
    """Draw t and s independently, then s = min(s, t) (sec. 7.3)."""
    start = logit_normal(u[0], t)
    end = torch.minimum(logit_normal(u[1], s), start)
    return Times(start, end, end)


def gap(u: Tensor, g: Normal, s: Normal) -> Times:
    """Draw g = t - s, then s truncated to s <= 1 - g, then t = s + g (sec. 7.3)."""
    difference = logit_normal(u[0], g)
    end = logit_normal(u[1], s, 1 - difference)
    return Times((end + difference).clamp_max(1.0), end, end)


def gap_star(u: Tensor, g: Normal, s: Normal) -> Times:
    """Draw as gap does, and s' independently for flow matching: logit-normal like s, not truncated (sec. 7.3)."""
    return gap(u, g, s)._replace(s_prime=logit_normal(u[2], s))


def sorted_pair(u: Tensor, first: Normal, second: Normal) -> Times:
    """Draw two times independently; the larger is t, the smaller s, and s' is t (MeanFlow, 2505.13447, sec. 4.3)."""
    a, b = logit_normal(u[0], first), logit_normal(u[1], second)
    return Times(torch.maximum(a, b), torch.minimum(a, b), torch.maximum(a, b))


def triangle(u: Tensor, first: Normal, second: Normal) -> Times:
    """Draw (t, s) uniformly on 0 <= s <= t <= 1, and s' independently (self-distillation, 2505.18825); no normals."""
    return Times(torch.maximum(u[0], u[1]), torch.minimum(u[0], u[1]), u[2])


def dyadic(u: Tensor, first: Normal, second: Normal) -> Times:
    """Draw jumps of length d = 1, 1/2, ..., 2/M on the grid of d's multiples, M = DYADIC_STEPS (shortcut, 2410.12557).

    s' is uniform on 1/M, 2/M, ..., 1. No normals.
    """
    levels = DYADIC_STEPS.bit_length() - 1
    jumps = 2 ** (u[0] * levels).floor()  # 1/d
    start = ((u[1] * jumps).floor() + 1) / jumps
    return Times(start, start - 1 / jumps, ((u[2] * DYADIC_STEPS).floor() + 1) / DYADIC_STEPS)


def soflow(u: Tensor, t: Normal, s: Normal) -> Times:
    """Draw as clamp does, with s at most t - 1e-4, and s' independently (SoFlow, 2512.15657, its authors' code)."""
    start = logit_normal(u[0], t)
    end = torch.minimum(logit_normal(u[1], s), start - 1e-4).clamp_min(0.0)
    return Times(start, end, logit_normal(u[2], (-0.2, 1.0)))


DYADIC_STEPS = 128  # shortcut models count jumps of 1/128 and shorter as velocities
NO_NORMAL = (math.nan, math.nan)

# name: (function, its first and second (mean, std)); the values of the first four are the best of the paper's table 3
TIME_SAMPLERS = {
    "trunc": (trunc, (1.0, 1.0), (-0.4, 1.0)),
    "clamp": (clamp, (1.0, 1.0), (-0.4, 1.0)),
    "gap": (gap, (-0.8, 1.0), (-0.4, 1.0)),
    "gap*": (gap_star, (-0.8, 1.0), (-0.4, 1.0)),
    "sorted": (sorted_pair, (-0.4, 1.0), (-0.4, 1.0)),
    "soflow": (soflow, (0.2, 0.8), (-1.0, 0.8)),
    "triangle": (triangle, NO_NORMAL, NO_NORMAL),
    "dyadic": (dyadic, NO_NORMAL, NO_NORMAL),
}


@dataclass(frozen=True)
class TimeSampler:
    """A sampler of TIME_SAMPLERS with its settings.

    Raises:
        ValueError: an unknown kind, a standard deviation that is not positive, normals for a kind that has none,
            fractions outside [0, 1].
    """

    kind: str = "gap*"  # the paper's final choice (fig. 9)
    first: Normal | None = None  # (mean, std) of t (trunc, clamp) or of t - s (gap, gap*); None: the paper's
    second: Normal | None = None  # (mean, std) of s; None: the paper's
    equal_share: float = 0.0  # fraction of samples with t = s = s': flow matching except in PID (table 4d)
    noise_share: float = 0.0  # fraction of samples with t set to 1, where one-step generation starts (not in the paper)

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, TIME_SAMPLERS)
        has_normal = TIME_SAMPLERS[self.kind][1] is not NO_NORMAL
        for mean, std in (normal for normal in (self.first, self.second) if normal is not None):
            require(has_normal, f"time sampler '{self.kind}' has no mean and standard deviation")
            require(std > 0, f"the standard deviation of logit(time) must be positive, got {std}")
            require(math.isfinite(mean), f"the mean of logit(time) must be finite, got {mean}")
        shares = self.equal_share >= 0 and self.noise_share >= 0 and self.equal_share + self.noise_share <= 1
        require(shares, "equal_share and noise_share must not be negative, nor exceed 1 together")

    @property
    def draws_equal_times(self) -> bool:
        """True if samples with t = s are drawn: a fraction of them, or where clamp cuts s at t."""
        return self.equal_share > 0 or self.kind == "clamp"

    def draw(self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Times:
        """Draw the times of n samples, float32. They are drawn on the CPU, in float64, and moved to `device`."""
        u = torch.rand(3, n, generator=generator, dtype=torch.float64)
        if self.equal_share or self.noise_share:
            u = torch.cat([u, torch.rand(1, n, generator=generator)])
        return Times(*(a.to(device) for a in self.from_uniform(u)))

    def from_uniform(self, u: Tensor) -> Times:
        """Map numbers of the unit cube, u [4, n] (float64), to the times of n samples, float32.

        The last row chooses the samples with t = s or t = 1; if there are none, [3, n] suffices.
        """
        sampler, first, second = TIME_SAMPLERS[self.kind]
        times = sampler(u[:3], self.first or first, self.second or second)
        if self.equal_share or self.noise_share:
            t, s = (torch.where(u[3] < self.equal_share, times.s_prime, a) for a in (times.t, times.s))
            t = torch.where(u[3] >= 1 - self.noise_share, 1.0, t)
            times = times._replace(t=t, s=s)
        return Times(*(a.float() for a in times))
