"""How training draws its times: the four samplers of the paper's sec. 7.3, each exact, and those of its relatives."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tvm_ref.shapes import Time

Normal = tuple[float, float]  # mean and standard deviation of logit(time)


class Times(NamedTuple):
    """Times of one batch, all [B], with 0 <= s <= t <= 1.

    Attributes:
        t: where jumps start.
        s: where jumps end.
        s_prime: where flow matching is done: TVM's second term, and the samples of a share t = s. Equal to s unless the
            sampler draws it on its own.
    """

    t: Time
    s: Time
    s_prime: Time


def logit_normal(
    n: int, normal: Normal, upper: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Draw n times [n] (float64): sigmoid(z), z ~ N(mean, std^2), truncated to (0, upper] where `upper` [n] is given.

    Exact, by inverting the distribution function: u is uniform below that of the bound.
    """
    mean, std = normal
    u = torch.rand(n, generator=generator, dtype=torch.float64)
    u = u.clamp_min(torch.finfo(u.dtype).tiny)
    if upper is None:
        return torch.sigmoid(mean + std * torch.special.ndtri(u))
    bound = torch.special.ndtr((torch.logit(upper) - mean) / std)
    return torch.minimum(torch.sigmoid(mean + std * torch.special.ndtri(u * bound)), upper)


def trunc(n: int, t: Normal, s: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw t, then s truncated to s <= t (sec. 7.3)."""
    start = logit_normal(n, t, None, generator)
    end = logit_normal(n, s, start, generator)
    return Times(start, end, end)


def clamp(n: int, t: Normal, s: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw t and s on their own, then s = min(s, t) (sec. 7.3)."""
    start = logit_normal(n, t, None, generator)
    end = torch.minimum(logit_normal(n, s, None, generator), start)
    return Times(start, end, end)


def gap(n: int, g: Normal, s: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw g = t - s, then s truncated to s <= 1 - g, then t = s + g (sec. 7.3)."""
    difference = logit_normal(n, g, None, generator)
    end = logit_normal(n, s, 1 - difference, generator)
    return Times((end + difference).clamp_max(1.0), end, end)


def gap_star(n: int, g: Normal, s: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw as gap does, and s' on its own for flow matching: logit-normal like s, not truncated (sec. 7.3)."""
    return gap(n, g, s, generator)._replace(s_prime=logit_normal(n, s, None, generator))


def sorted_pair(n: int, first: Normal, second: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw two times on their own; the larger is t, the smaller s, and s' is t (MeanFlow, 2505.13447, sec. 4.3)."""
    a, b = logit_normal(n, first, None, generator), logit_normal(n, second, None, generator)
    return Times(torch.maximum(a, b), torch.minimum(a, b), torch.maximum(a, b))


def triangle(n: int, first: Normal, second: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw (t, s) uniformly on 0 <= s <= t <= 1, and s' on its own (self-distillation, 2505.18825); no normals."""
    a, b, s_prime = torch.rand(3, n, generator=generator, dtype=torch.float64)
    return Times(torch.maximum(a, b), torch.minimum(a, b), s_prime)


def dyadic(n: int, first: Normal, second: Normal, generator: torch.Generator | None = None) -> Times:
    """Draw jumps of length d = 1, 1/2, ..., 2/M on the grid of d's multiples, M = DYADIC_STEPS (shortcut, 2410.12557).

    s' is uniform on 1/M, 2/M, ..., 1. No normals.
    """
    levels = DYADIC_STEPS.bit_length() - 1
    jumps = 2 ** torch.randint(levels, (n,), generator=generator)  # 1/d
    u, s_prime = torch.rand(2, n, generator=generator, dtype=torch.float64)
    start = ((u * jumps).floor() + 1) / jumps
    return Times(start, start - 1 / jumps, ((s_prime * DYADIC_STEPS).floor() + 1) / DYADIC_STEPS)


DYADIC_STEPS = 128  # shortcut models count jumps shorter than 1/128 as velocities
NO_NORMAL = (math.nan, math.nan)

# name: (function, its first and second (mean, std)); the values of the first four are the best of the paper's table 3
TIME_SAMPLERS = {
    "trunc": (trunc, (1.0, 1.0), (-0.4, 1.0)),
    "clamp": (clamp, (1.0, 1.0), (-0.4, 1.0)),
    "gap": (gap, (-0.8, 1.0), (-0.4, 1.0)),
    "gap*": (gap_star, (-0.8, 1.0), (-0.4, 1.0)),
    "sorted": (sorted_pair, (-0.4, 1.0), (-0.4, 1.0)),
    "triangle": (triangle, NO_NORMAL, NO_NORMAL),
    "dyadic": (dyadic, NO_NORMAL, NO_NORMAL),
}


@dataclass(frozen=True)
class TimeSampler:
    """A sampler of TIME_SAMPLERS with its settings.

    Raises:
        ValueError: an unknown kind, a standard deviation that is not positive, normals for a kind that has none, shares
            outside [0, 1].
    """

    kind: str = "gap*"  # the paper's final choice (fig. 9)
    first: Normal | None = None  # (mean, std) of t (trunc, clamp) or of t - s (gap, gap*); None: the paper's
    second: Normal | None = None  # (mean, std) of s; None: the paper's
    share_equal: float = 0.0  # share of samples with t = s = s', where all but PID are flow matching (table 4d)
    share_noise: float = 0.0  # share of samples with t set to 1, where one-step generation starts (not in the paper)

    def __post_init__(self) -> None:
        if self.kind not in TIME_SAMPLERS:
            raise ValueError(f"unknown time sampler '{self.kind}'; choose one of {', '.join(TIME_SAMPLERS)}")
        for normal in (self.first, self.second):
            if normal is not None and TIME_SAMPLERS[self.kind][1] is NO_NORMAL:
                raise ValueError(f"time sampler '{self.kind}' has no mean and standard deviation")
            if normal is not None and not normal[1] > 0:
                raise ValueError(f"the standard deviation of logit(time) must be positive, got {normal[1]}")
            if normal is not None and not math.isfinite(normal[0]):
                raise ValueError(f"the mean of logit(time) must be finite, got {normal[0]}")
        if not (self.share_equal >= 0 and self.share_noise >= 0 and self.share_equal + self.share_noise <= 1):
            raise ValueError("share_equal and share_noise must not be negative, nor exceed 1 together")

    def draw(self, n: int, generator: torch.Generator | None = None, device: torch.device | str | None = None) -> Times:
        """Draw the times of n samples, float32. They are drawn on the CPU, in float64, and moved to `device`."""
        sampler, first, second = TIME_SAMPLERS[self.kind]
        times = sampler(n, self.first or first, self.second or second, generator)
        if self.share_equal or self.share_noise:
            u = torch.rand(n, generator=generator)
            t, s = (torch.where(u < self.share_equal, times.s_prime, a) for a in (times.t, times.s))
            t = torch.where(u >= 1 - self.share_noise, 1.0, t)
            times = times._replace(t=t, s=s)
        return Times(*(a.float().to(device) for a in times))
