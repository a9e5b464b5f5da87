"""What objectives are made of: a flow map, loss terms, the target of guidance; and a frame for those of one residual.

Every objective is a module called as objective(x0, x1, times, condition, target) that returns LossTerms: the JVP runs
inside its forward, so that DDP, FSDP or torch.compile can wrap it.
"""

from dataclasses import dataclass, fields, replace
from typing import ClassVar, NoReturn, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, guided_velocity, without_label
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives.weights import Weight, unweighted
from tvm_ref.shapes import PerSample, Sample, Time, over, values_are_cheap
from tvm_ref.time_samplers import Times, TimeSampler


@runtime_checkable
class Flow(Protocol):
    """What TVM asks of its flow map and of its target: a FlowMap or the exact flow of a toy distribution."""

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
        flow_matching: [B] the term that trains the velocity (zero in MeanFlow, whose one term does both).
    """

    jump: PerSample
    flow_matching: PerSample

    @property
    def total(self) -> PerSample:
        """[B] what training minimises the mean of."""
        return self.jump + self.flow_matching

    def backward(self) -> NoReturn:
        """Raise TypeError with what to do: these are terms per sample, and the loss is the mean of their total."""
        raise TypeError("LossTerms are no loss, but terms per sample; take terms.total.mean().backward()")

    def check_finite(self) -> None:
        """Raise FloatingPointError, naming the term, if a term is NaN or infinite."""
        if bool(torch.isfinite(self.total).all()):
            return
        for name in TERMS:
            bad = int((~torch.isfinite(getattr(self, name))).sum())
            if bad:
                raise FloatingPointError(f"the {name} loss is NaN or infinite in {bad} samples")


TERMS = tuple(f.name for f in fields(LossTerms))


def check_drawn(times: Times) -> None:
    """Raise TypeError unless times are Times, as a TimeSampler draws them."""
    if not isinstance(times, Times):
        raise TypeError(
            f"times must be Times(t, s, s_prime), as TimeSampler().draw(len(x0)) returns; got {type(times).__name__}"
        )


def mean_square(a: Sample) -> PerSample:
    """Return ||a||^2 / (number of elements) of each sample: [B, ...] to [B]."""
    return a.flatten(1).square().mean(1)


def guided_target(
    v: Sample, x: Sample, t: Time, condition: Condition | None, null_label: int | None, target: Flow
) -> Sample:
    """Return what u(x, t, c, w) is regressed on (eq. 14): w v + (1 - w) u*(x, t, no class, 1); v without a null label.

    No gradient flows through the target's velocity u*.

    Raises:
        ValueError: guidance (beta other than 1) without a null label, values being looked at as in check_times; a null
            label without a condition.
    """
    if condition is None:
        if null_label is not None:
            raise ValueError("an objective with a null_label needs a condition: Condition(label, beta)")
        return v
    if null_label is None:
        if values_are_cheap(v) and bool((condition.beta != 1).any()):
            raise ValueError("guidance (beta other than 1) needs the objective's null_label")
        return v
    with torch.no_grad():
        unconditional = target.velocity(x, t, without_label(condition, null_label))
    return guided_velocity(v, unconditional, condition.beta)


class Objective(nn.Module):
    """What all objectives share: the flow map that they train, and guidance.

    An objective may have weights of its own (see LearnedWeight), so optimise objective.parameters().

    Args:
        flow_map: the model, or the exact flow, whose loss is the minimum.
        null_label: the label that means "no class"; None where w = 1 throughout, which saves one call of the target.

    Attributes:
        learns_jumps: whether f(x, t, s) is trained for s < t; without, a model takes Euler steps (see stepper).
        one_step_only: whether that holds for s = 0 alone, so that a model is for one step.
        has_guidance: whether guidance (classifier-free, inside the target) is implemented for the method.
        has_curriculum: whether set_progress changes it, so that it is shaped by the number of training steps.
        default_times: the law of times that the method's paper trains with.
        needs_equal_times: whether the method meets the data where t = s alone; without such samples it learns nothing.

    Raises:
        ValueError: a null label for a method without guidance.
        TypeError: a network that is not wrapped in a FlowMap.
    """

    learns_jumps: ClassVar[bool] = True
    one_step_only: ClassVar[bool] = False
    has_guidance: ClassVar[bool] = True
    has_curriculum: ClassVar[bool] = False
    default_times: ClassVar[TimeSampler] = TimeSampler()
    needs_equal_times: ClassVar[bool] = False

    def __init__(self, flow_map: Flow, *, null_label: int | None = None):
        super().__init__()
        if null_label is not None and not self.has_guidance:
            raise ValueError(f"{type(self).__name__} takes no null_label: it has no guidance here")
        if not hasattr(flow_map, "velocity"):
            raise TypeError(f"{type(self).__name__} trains a flow map; wrap the network: FlowMap(network)")
        self.flow_map = flow_map
        self.null_label = null_label

    @property
    def learned_weight(self) -> nn.Module:
        """The learned weight of the loss, to save beside the model; a module without tensors where there is none."""
        weight = getattr(self, "weight", None)
        return weight if isinstance(weight, nn.Module) else nn.Module()

    @classmethod
    def make_times(
        cls, times: TimeSampler | None = None, equal_share: float | None = None, noise_share: float = 0.0
    ) -> TimeSampler:
        """Make the distribution of times of a training of this method.

        Args:
            times: whose shares are replaced; None: default_times.
            equal_share: fraction of samples with t = s; None: that of default_times.
            noise_share: fraction of samples with t = 1.

        Raises:
            ValueError: see TimeSampler; no samples with t = s for a method that needs them.
        """
        times = times or cls.default_times
        equal_share = cls.default_times.share_equal if equal_share is None else equal_share
        times = replace(times, share_equal=equal_share, share_noise=noise_share)
        if cls.needs_equal_times and not times.draws_equal_times:
            raise ValueError(f"{cls.__name__} meets the data only where t = s: equal_share must be above 0")
        return times

    def set_progress(self, progress: float) -> None:
        """Tell how much of training is done, from 0 to 1, before a step; only a method with a curriculum listens."""

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B] of data x0 and noise x1, both [B, ...], at times drawn by a TimeSampler.

        `target` is a flow map, usually the EMA of the model, that the caller has frozen (as EMA does); None means the
        model itself.

        Raises:
            ValueError: shapes that do not fit, times that break 0 <= s <= t <= 1, guidance without a null label, a null
                label without a condition.
            TypeError: times that are no Times, data of whole numbers.
        """
        raise NotImplementedError


class ResidualObjective(Objective):
    """An objective that is one residual for F, squared and weighted: of a jump where s < t, of flow matching at t = s.

    A method is its `residual`, what is stopped in it, `default_times` and a `weight`. With a condition the residual is
    multiplied by beta, which is the weight 1/w^2 of eq. 15, and guided_target stands for v.

    Args:
        flow_map: the model.
        null_label: see Objective.
        weight: of the square; None is one.
    """

    flow_map: FlowMap
    one_term: ClassVar[bool] = False  # whether flow matching is no case of its own, so that all of the loss is `jump`

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, weight: Weight | None = None):
        super().__init__(flow_map, null_label=null_label)
        self.weight: Weight = unweighted if weight is None else weight

    def residual(
        self, x: Sample, v: Sample, t: Time, s: Time, times: Times, condition: Condition | None, target: FlowMap
    ) -> Sample:
        """Return the residual [B, ...] at x = x_t, with gradients where the method has them; at t = s it must be F - v.

        Args:
            x: [B, ...] x_t.
            v: [B, ...] the velocity x1 - x0 of the sample, or the target of eq. 14 in its place.
            t: [B] where the jump starts.
            s: [B] where the jump ends.
            times: all times that were drawn.
            condition: labels and beta, or None.
            target: the frozen flow map.
        """
        raise NotImplementedError

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective."""
        check_drawn(times)
        teacher = cast(FlowMap, self.flow_map if target is None else target)
        t, s = times.t, times.s
        x = interpolate(x0, x1, t)
        v = guided_target(conditional_velocity(x0, x1), x, t, condition, self.null_label, teacher)
        residual = self.residual(x, v, t, s, times, condition, teacher)
        if condition is not None:
            residual = over(condition.beta, residual) * residual  # beta^2 = 1/w^2 once squared
        loss = self.weigh(mean_square(residual), t, s)
        if self.one_term:
            return LossTerms(loss, torch.zeros_like(loss))
        return LossTerms(torch.where(t != s, loss, 0.0), torch.where(t != s, 0.0, loss))

    def weigh(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return the loss [B] of squared residuals [B]."""
        return self.weight(square, t, s)
