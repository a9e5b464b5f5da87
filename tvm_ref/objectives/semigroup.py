"""Objectives of the semigroup identity: a jump is two shorter ones, one after the other.

    X(X(x, t, r), r, s) = X(x, t, s),    residual    F(x, t, s) - [(1 - h) F(x, t, r) + h F(X(x, t, r), r, s)]

where r = s + h (t - s). No derivative is taken; the long jumps are learned from shorter ones.
"""

import contextlib
from typing import ClassVar

import torch
from torch import Tensor

from tvm_ref.checks import require, require_one_of
from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.objectives.base import Jumps, Method, SelfDistillation
from tvm_ref.shapes import Sample, over
from tvm_ref.time_samplers import DYADIC_STEPS, TimeSampler


class PSD(SelfDistillation):
    """Progressive self-distillation (Boffi, Albergo, Vanden-Eijnden, 2505.18825).

        ||F(x_t, t, s) - sg[(1 - h) F*(x_t, t, r) + h F*(X*(x_t, t, r), r, s)]||^2,    r = s + h (t - s)

    With `stops` "convex" the two shorter jumps are the target's; with "none" the model's own, with gradients. `split`
    is "midpoint", h = 1/2, or "uniform", h the sample's s_prime, which is free off the diagonal and uniform under
    default_times: that is SplitMeanFlow (Guo and others, 2507.16884).
    """

    method = Method(
        "psd",
        "PSD",
        "Progressive self-distillation trains a jump by two shorter ones, one after the other.",
        sweeps=({}, {"settings": {"split": "uniform"}}, {"target_ema": 0.99}),
        measured_as=(("PSD, midpoint", {}), ("PSD, uniform (SplitMeanFlow)", {"split": "uniform"})),
    )
    SPLITS: ClassVar[tuple[str, ...]] = ("midpoint", "uniform")

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        stops: str | None = None,
        learned_weight: bool = False,
        split: str = "midpoint",
    ):
        super().__init__(flow_map, null_label=null_label, stops=stops, learned_weight=learned_weight)
        require_one_of("split", split, self.SPLITS)
        self.split = split

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F(x_t, t, s), and the average velocity over two jumps via r."""
        x, _, t, s, s_prime, condition, target = jumps
        # shorter jumps are learned sooner, so they teach the longer one
        teacher = self.flow_map if self.stops == "none" else target
        # the midpoint needs log2(1 / shortest) levels; a uniform split lets every jump teach every longer one
        h = s_prime if self.split == "uniform" else torch.full_like(t, 0.5)
        r = (s + h * (t - s)).clamp(s, t)  # rounding must not put it outside [s, t]
        with contextlib.nullcontext() if self.stops == "none" else torch.no_grad():
            # from t to r, and on from where that lands; the weights are the two jumps' fractions of t - s
            first = self.shorter_jump(teacher, x, t, r, condition)
            second = self.shorter_jump(teacher, x + over(r - t, x) * first, r, s, condition)
        return self.flow_map.F(x, t, s, condition), over(1 - h, x) * first + over(h, x) * second

    def shorter_jump(self, teacher: FlowMap, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        """Return F [B, ...] of one of the two shorter jumps."""
        return teacher.F(x, t, s, condition)


class Shortcut(PSD):
    """Shortcut models (Frans and others, 2410.12557): PSD at the midpoint, for jumps that halve from 1 to 2/M.

    Jumps of 1/M and shorter count as velocities: F(x, t, t) replaces them, the only place where the exact flow map is
    not a minimum (the error is of the order of 1/M). Times are the paper's: three quarters of a batch on the
    diagonal, levels uniform; in its code seven eighths, levels not uniform, and targets clipped at 4. The target is an
    EMA, as in the code. Its guidance, by one fixed weight only at the shortest jumps, is left out. A model sampled in M
    steps or more takes jumps here, where the code takes F(x, t, t).

    Args:
        flow_map: the model.
        null_label: must be None.
        steps: M, at least 1; the time sampler "dyadic" assumes 128.
    """

    method = Method(
        "shortcut",
        "shortcut",
        "A shortcut model trains a jump by two of half its length; lengths are powers of 1/2.",
        sweeps=({}, {"target_ema": 0.99}, {"target_ema": 0.99, "equal_share": 0.5}),
        measured_as=(("shortcut", {}),),
    )
    default_times = TimeSampler("dyadic", equal_share=0.75)
    default_target_ema = 0.999

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, steps: int = DYADIC_STEPS):
        super().__init__(flow_map, null_label=null_label)
        require(steps >= 1, f"a shortcut model needs at least one step, got steps {steps}")
        self.steps = steps

    def shorter_jump(self, teacher: FlowMap, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        """Return F(x, t, s) [B, ...], or F(x, t, t) if t - s <= 1/M."""
        # 1/M is the finest step; below it a jump is as good as a straight line along the velocity
        return teacher.F(x, t, torch.where(t - s <= 1 / self.steps, t, s), condition)
