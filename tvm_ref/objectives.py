"""Terminal Velocity Matching (eq. 12 and 15) and the objectives that it is compared with, on the same FlowMap.

Every objective is a module called as objective(x0, x1, times, condition, target) that returns LossTerms: the JVP runs
inside its forward, so that DDP, FSDP or torch.compile can wrap it.
"""

from dataclasses import dataclass, fields
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, guided_velocity, without_label
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.shapes import PerSample, Sample, Time, over
from tvm_ref.time_samplers import Times


@runtime_checkable
class Flow(Protocol):
    """What an objective asks of its flow map and of its target: a FlowMap or the exact flow of a toy distribution."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """See FlowMap.velocity."""
        ...

    def displacement_and_terminal_velocity(
        self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Tensor, Tensor]:
        """See FlowMap.displacement_and_terminal_velocity."""
        ...


@dataclass(frozen=True)
class LossTerms:
    """The terms of an objective, one number per sample; squared norms are means over a sample's elements.

    Attributes:
        jump: [B] the term that trains jumps (zero in flow matching).
        flow_matching: [B] the term that trains the velocity (zero in MeanFlow).
    """

    jump: PerSample
    flow_matching: PerSample

    @property
    def total(self) -> PerSample:
        """[B] what training minimises the mean of."""
        return self.jump + self.flow_matching

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming the term, if a term is NaN or infinite."""
        if bool(torch.isfinite(self.total).all()):
            return
        for name in TERMS:
            bad = int((~torch.isfinite(getattr(self, name))).sum())
            if bad:
                raise FloatingPointError(f"the {name} loss is NaN or infinite in {bad} samples")


TERMS = tuple(f.name for f in fields(LossTerms))


def mean_square(a: Sample) -> PerSample:
    """||a||^2 / (number of elements) of each sample: [B, ...] to [B]."""
    return a.flatten(1).square().mean(1)


def guided_target(
    v: Sample, x: Sample, t: Time, condition: Condition | None, null_label: int | None, target: Flow
) -> Sample:
    """What u(x, t, c, w) is regressed on (eq. 14): w v + (1 - w) u*(x, t, no class, 1), or v without a null label.

    No gradient flows through the target's velocity u*.

    Raises:
        ValueError: guidance (beta other than 1) without a null label; values are looked at as in check_times.
    """
    if condition is None:
        return v
    if null_label is None:
        if not torch.compiler.is_compiling() and v.device.type == "cpu" and bool((condition.beta != 1).any()):
            raise ValueError("guidance (beta other than 1) needs the objective's null_label")
        return v
    with torch.no_grad():
        unconditional = target.velocity(x, t, without_label(condition, null_label))
    return guided_velocity(v, unconditional, condition.beta)


class Objective(nn.Module):
    """What all objectives share: the flow map that they train, and guidance.

    Args:
        flow_map: the model, or the exact flow, whose loss is the minimum.
        null_label: the label that means "no class"; None where w = 1 throughout, which saves one call of the target.

    Attributes:
        learns_jumps: whether f(x, t, s) is trained for s < t; without, a model takes Euler steps (see stepper).
    """

    learns_jumps: ClassVar[bool] = True

    def __init__(self, flow_map: Flow, *, null_label: int | None = None):
        super().__init__()
        self.flow_map = flow_map
        self.null_label = null_label

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """The loss terms [B] of data x0 and noise x1, both [B, ...], at times drawn by a TimeSampler.

        `target` is a flow map, usually the EMA of the model, that the caller has frozen (as EMA does); None means the
        model itself.

        Raises:
            ValueError: shapes that do not fit, times that break 0 <= s <= t <= 1.
        """
        raise NotImplementedError


class TVM(Objective):
    """Terminal Velocity Matching (eq. 12; with a condition eq. 15).

        1/w^2 ( 1{t != s} ||d/ds f(x_t, t, s) - u*(x_t + sg f(x_t, t, s), s)||^2
                + ||u(x_s', s') - [w v + (1 - w) u*(x_s', s', no class)]||^2 )

    where u* is the velocity of the target; without a target, the model's own, with gradients. 1/w^2 is each sample's
    own beta^2. Without a target and with detach_landing=False this is eq. 9.

    Args:
        flow_map: the model.
        null_label: see Objective.
        detach_jvp: no gradient through dF/ds: cheaper, biased (sec. 7.4).
        detach_landing: sg, no gradient through the point where u* is taken (eq. 8).
    """

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        detach_jvp: bool = False,
        detach_landing: bool = True,
    ):
        super().__init__(flow_map, null_label=null_label)
        self.detach_jvp = detach_jvp
        self.detach_landing = detach_landing

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective."""
        target = self.flow_map if target is None else target
        t, s, s_prime = times

        x_t = interpolate(x0, x1, t)
        f, df_ds = self.flow_map.displacement_and_terminal_velocity(x_t, t, s, condition, detach_jvp=self.detach_jvp)
        landing = x_t + (f.detach() if self.detach_landing else f)
        terminal = mean_square(df_ds - target.velocity(landing, s, condition))

        x_s = interpolate(x0, x1, s_prime)
        v = guided_target(conditional_velocity(x0, x1), x_s, s_prime, condition, self.null_label, target)
        boundary = mean_square(self.flow_map.velocity(x_s, s_prime, condition) - v)

        weight = torch.ones_like(t) if condition is None else condition.beta**2  # 1/w^2
        return LossTerms(weight * torch.where(t != s, terminal, 0.0), weight * boundary)


class PID(TVM):
    """Physics Informed Distillation (eq. 19) of `target`, beside flow matching of the model: TVM with every t = 1.

    Given a trained target this is distillation; given the model's EMA, the joint training of sec. 7.3.
    """

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective; times.t is not used."""
        return super().forward(x0, x1, times._replace(t=torch.ones_like(times.t)), condition, target)


class FlowMatching(Objective):
    """Flow matching (eq. 1): ||u(x_s', s') - v||^2. It trains the velocity alone.

    With a condition it is eq. 14, weighted by 1/w^2: guided_target stands for v.
    """

    learns_jumps = False

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective; of the times only s_prime is used."""
        target = self.flow_map if target is None else target
        x, t = interpolate(x0, x1, times.s_prime), times.s_prime
        v = guided_target(conditional_velocity(x0, x1), x, t, condition, self.null_label, target)
        error = mean_square(self.flow_map.velocity(x, t, condition) - v)
        weight = torch.ones_like(t) if condition is None else condition.beta**2
        return LossTerms(torch.zeros_like(error), weight * error)


class MeanFlow(Objective):
    """MeanFlow (eq. 18): ||F(x_t, t, s) - sg(v + (s - t) [v . grad_x F + dF/dt])||^2.

    With a condition, guided_target stands for v and the loss is weighted by 1/w^2, as in TVM.
    It matches the velocity where a jump starts; its JVP runs in x and t. It is flow matching at t = s, so its times
    need a share of t = s (TimeSampler.share_equal).
    """

    flow_map: FlowMap

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective; times.s_prime is not used."""
        target = self.flow_map if target is None else target
        t, s, _ = times
        x_t = interpolate(x0, x1, t)
        v = guided_target(conditional_velocity(x0, x1), x_t, t, condition, self.null_label, target)
        F, dF_dt = self.flow_map.average_velocity_and_total_derivative(x_t, t, s, v, condition)
        error = mean_square(F - (v + over(s - t, v) * dF_dt).detach())
        weight = torch.ones_like(t) if condition is None else condition.beta**2
        return LossTerms(weight * error, torch.zeros_like(error))


OBJECTIVES: dict[str, type[Objective]] = {"tvm": TVM, "fm": FlowMatching, "meanflow": MeanFlow, "pid": PID}
