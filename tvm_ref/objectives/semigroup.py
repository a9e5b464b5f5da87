"""Objectives of the semigroup identity: a jump is two shorter ones, one after the other.

    X(X(x, t, r), r, s) = X(x, t, s),    residual    F(x, t, s) - [(1 - h) F(x, t, r) + h F(X(x, t, r), r, s)]

where r = s + h (t - s). No derivative is taken; the long jumps are learned from shorter ones.
"""

import contextlib
from typing import ClassVar

import torch
from torch import Tensor

from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.objectives.base import Flow
from tvm_ref.objectives.self_distillation import SelfDistillation
from tvm_ref.shapes import Sample, Time, over
from tvm_ref.time_samplers import DYADIC_STEPS, Times, TimeSampler


class PSD(SelfDistillation):
    """Progressive self-distillation (Boffi, Albergo, Vanden-Eijnden, 2505.18825).

        ||F(x_t, t, s) - sg[(1 - h) F*(x_t, t, r) + h F*(X*(x_t, t, r), r, s)]||^2,    r = s + h (t - s)

    With `stops` "convex" the two shorter jumps are the target's; with "none" the model's own, with gradients. `split`
    is "midpoint", h = 1/2, or "uniform", h the sample's s_prime, which is free off the diagonal and uniform under
    default_times: that is SplitMeanFlow (Guo and others, 2507.16884).
    """

    SPLITS: ClassVar[tuple[str, ...]] = ("midpoint", "uniform")

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        stops: str = "convex",
        learned_weight: bool = False,
        split: str = "midpoint",
    ):
        super().__init__(flow_map, null_label=null_label, stops=stops, learned_weight=learned_weight)
        if split not in self.SPLITS:
            raise ValueError(f"a jump is split by one of {', '.join(self.SPLITS)}; got '{split}'")
        self.split = split

    def residual(
        self, x: Sample, v: Sample, t: Time, s: Time, times: Times, condition: Condition | None, target: FlowMap
    ) -> Sample:
        """See ResidualObjective."""
        teacher = self.flow_map if self.stops == "none" else target
        h = times.s_prime if self.split == "uniform" else torch.full_like(t, 0.5)
        r = (s + h * (t - s)).clamp(s, t)
        with contextlib.nullcontext() if self.stops == "none" else torch.no_grad():
            first = self.shorter_jump(teacher, x, t, r, condition)
            second = self.shorter_jump(teacher, x + over(r - t, x) * first, r, s, condition)
        average = over(1 - h, x) * first + over(h, x) * second
        F = self.flow_map.average_velocity(x, t, s, condition)
        return F - torch.where(over(t == s, v), v, average)

    def shorter_jump(self, teacher: FlowMap, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        """Return F [B, ...] of one of the two shorter jumps."""
        return teacher.average_velocity(x, t, s, condition)


class Shortcut(PSD):
    """Shortcut models (Frans and others, 2410.12557): PSD at the midpoint, for jumps that halve from 1 to 2/M.

    Jumps of 1/M and shorter count as velocities: for them F(x, t, t) stands, the only place where the exact flow map
    is not a minimum (its error is of the order of 1/M). The paper draws three quarters of a batch on the diagonal. Its
    guidance, by one fixed weight at the shortest jumps alone, is left out.

    Args:
        flow_map: the model.
        null_label: refused.
        steps: M; the times "dyadic" go with 128.
    """

    default_times = TimeSampler("dyadic", share_equal=0.75)

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, steps: int = DYADIC_STEPS):
        super().__init__(flow_map, null_label=null_label)
        self.steps = steps

    def shorter_jump(self, teacher: FlowMap, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        """See PSD: F(x, t, s), or F(x, t, t) if t - s <= 1/M."""
        return teacher.average_velocity(x, t, torch.where(t - s <= 1 / self.steps, t, s), condition)
