"""Base classes of all objectives: loss terms, the target of guidance, and the frame of methods with one residual.

Every objective is a module called as objective(x0, x1, times, condition, target) that returns LossTerms: the JVP runs
inside its forward, so that DDP, FSDP or torch.compile can wrap it.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from tvm_ref.checks import NotALoss, check_objective, checked_loss, has_values, require, require_one_of
from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.guidance import Condition, guided_velocity, without_label
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives.weights import LearnedWeight, Weight, unweighted
from tvm_ref.sampling import EulerStep, Jump
from tvm_ref.shapes import PerSample, Sample, Time, over
from tvm_ref.time_samplers import Times, TimeSampler


class Method(NamedTuple):
    """Metadata of an objective, from which tables and the choices of command lines are built.

    Attributes:
        key: its name on a command line.
        title: its name in tables and pictures.
        summary: one sentence on what trains its jumps.
        sweeps: what experiments/compare.py tries: options of the toy; the first is the method's default.
        measured_as: what experiments/family.py measures: names and settings, without adaptive weights unless named.
    """

    key: str
    title: str
    summary: str
    sweeps: tuple[dict[str, Any], ...] = ({},)
    measured_as: tuple[tuple[str, dict[str, Any]], ...] = ()


@dataclass(frozen=True)
class LossTerms(NotALoss):
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
        return self.jump + self.flow_matching  # both of weight one, as in eq. 12

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
    """Return ||a||^2 / (number of elements) of each sample: [B, ...] to [B]."""
    return a.flatten(1).square().mean(1)  # a mean, so that losses of points and of images are of one size


def guided_target(
    v: Sample, x: Sample, t: Time, condition: Condition | None, null_label: int | None, target: Flow
) -> Sample:
    """Return the target of flow matching (eq. 14): w v + (1 - w) u*(x, t, no class, 1), or v without a null label.

    u* is the target's velocity; no gradient flows through it.
    """
    if condition is None or null_label is None:
        return v
    # a sample's v has a class, so the unconditional velocity comes from the target; without sg the guided loss would
    # train it
    with torch.no_grad():
        unconditional = target.velocity(x, t, without_label(condition, null_label))
    return guided_velocity(v, unconditional, condition.beta)


class Objective(nn.Module):
    """Base of all objectives: the flow map that they train, and guidance.

    An objective may have weights of its own (see LearnedWeight), so optimise objective.parameters().

    Args:
        flow_map: the model; or an exact flow, to compute the least possible loss.
        null_label: the label that means "no class"; None where w = 1 throughout, which saves one call of the target.

    Attributes:
        method: its Method.
        learns_jumps: whether f(x, t, s) is trained for s < t; without, a model takes Euler steps (see stepper).
        one_step_only: whether only jumps to s = 0 are trained, so that a model is for one step.
        has_guidance: whether guidance (classifier-free, inside the target) is implemented for the method.
        has_curriculum: whether set_progress changes the loss during training.
        default_times: the distribution of times that the method's paper trains with.
        default_target_ema: decay of the target's weights in the method's paper; 0 is the model itself.
        needs_equal_times: whether the method meets the data only where t = s; without such samples it learns nothing.

    Raises:
        ValueError: a null label for a method without guidance.
        TypeError: a network that is not wrapped in a FlowMap.
    """

    method: ClassVar[Method]
    learns_jumps: ClassVar[bool] = True
    one_step_only: ClassVar[bool] = False
    has_guidance: ClassVar[bool] = True
    has_curriculum: ClassVar[bool] = False
    default_times: ClassVar[TimeSampler] = TimeSampler()
    default_target_ema: ClassVar[float] = 0.99
    needs_equal_times: ClassVar[bool] = False

    def __init__(self, flow_map: Flow, *, null_label: int | None = None):
        super().__init__()
        check_objective(type(self), flow_map, null_label)
        self.flow_map = flow_map
        self.null_label = null_label

    @property
    def learned_weight(self) -> nn.Module:
        """The learned weight of the loss, to save with the model; a module without tensors where there is none."""
        weight = getattr(self, "weight", None)  # a function for methods whose weight is not learned
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
        # LSD, ESD and PSD compare the model with itself: v enters only where t = s, and without such samples any flow
        # map would have no loss
        meets_data = times.draws_equal_times or not cls.needs_equal_times
        require(meets_data, f"{cls.__name__} meets the data only where t = s: equal_share must be above 0")
        return times

    @classmethod
    def stepper(cls, flow_map: FlowMap) -> Jump:
        """Return how a model of this objective takes a step: a jump, or, where it learned none, Euler's."""
        return flow_map if cls.learns_jumps else EulerStep(flow_map)  # F(x, t, s) for s < t was never trained

    def set_progress(self, progress: float) -> None:
        """Take note, before a step, of how much of training is done, from 0 to 1; only a curriculum changes by it."""

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


class Jumps(NamedTuple):
    """A batch of jumps: the arguments of a method's residual.

    Attributes:
        x: [B, ...] x_t, where jumps start.
        v: [B, ...] the velocity x1 - x0 of each sample, or the target of eq. 14 in its place.
        t: [B] when they start.
        s: [B] when they end.
        s_prime: [B] a third time, for methods that want one.
        condition: labels and beta, or None.
        target: the caller's frozen copy, or the model itself where none was given.
    """

    x: Sample
    v: Sample
    t: Time
    s: Time
    s_prime: Time
    condition: Condition | None
    target: FlowMap

    def at(self, rows: Tensor) -> "Jumps":
        """Return the jumps of some rows of the batch."""
        x, v, t, s, s_prime = (a[rows] for a in self[:5])
        condition = None if self.condition is None else Condition(*(a[rows] for a in self.condition))
        return Jumps(x, v, t, s, s_prime, condition, self.target)


class ResidualObjective(Objective):
    """An objective with one weighted squared residual per sample: the method's equation if s < t, else flow matching.

    A subclass defines `sides`, with its stop-gradients, `default_times` and a `weight`. With a condition guided_target
    stands for v. Its unconditional velocity is the model's own, and the square has no weight 1/w^2: so it is in the
    papers of the methods that have guidance here; TVM has the target's, and the weight.

    Args:
        flow_map: the model.
        null_label: see Objective.
        weight: of the square; None is one.
    """

    flow_map: FlowMap
    one_term: ClassVar[bool] = False  # all of the loss is `jump`: flow matching is not a case of its own

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, weight: Weight | None = None):
        super().__init__(flow_map, null_label=null_label)
        self.weight: Weight = unweighted if weight is None else weight

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return both sides of the method's equation [B, ...]; the loss is the square of their difference.

        Each has gradients where the method has them. At t = s the first side must be F(x, t, t).
        """
        raise NotImplementedError

    @checked_loss
    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective."""
        target = self.flow_map if target is None else target
        t, s, s_prime = times
        # each sample is either a jump or flow matching, at one x_t; TVM does both, at two points
        x = interpolate(x0, x1, t)
        v = guided_target(conditional_velocity(x0, x1), x, t, condition, self.null_label, self.flow_map)
        loss = self.weigh(self.square(Jumps(x, v, t, s, s_prime, condition, cast(FlowMap, target))), t, s)
        if self.one_term:
            return LossTerms(loss, torch.zeros_like(loss))
        # each sample contributes to one term and has zero in the other, so that their means add up to the loss
        return LossTerms(torch.where(t != s, loss, 0.0), torch.where(t != s, 0.0, loss))

    def square(self, jumps: Jumps) -> PerSample:
        """Return the squared residual [B]: of the method's equation where t != s, of flow matching where t = s."""
        equal = jumps.t == jumps.s
        if not has_values(equal):
            # torch.compile needs shapes that do not depend on the times, so every sample is computed as a jump.
            # F(x, t, t) is the velocity: at t = s the left side is regressed on v instead of the right one
            left, right = self.sides(jumps)
            return mean_square(left - torch.where(over(equal, right), jumps.v, right))
        # a jump costs two or three times as much as flow matching, so each sample gets only what it needs
        squares, order = [], []
        for rows, square in ((~equal, self.square_of_jumps), (equal, self.square_of_velocity)):
            index = rows.nonzero()[:, 0]
            if len(index) or (torch.distributed.is_available() and torch.distributed.is_initialized()):
                # all processes must call the network alike, as FSDP gathers its weights in every call: one that has no
                # such sample takes any, whose square is dropped
                used = index if len(index) else index.new_zeros(1)
                squares.append(square(jumps.at(used))[: len(index)])
                order.append(index)
        return torch.cat(squares)[torch.cat(order).argsort()]

    def square_of_jumps(self, jumps: Jumps) -> PerSample:
        """Return the square [B] of the difference of both sides."""
        left, right = self.sides(jumps)
        return mean_square(left - right)

    def square_of_velocity(self, jumps: Jumps) -> PerSample:
        """Return the square [B] of flow matching (eq. 1, with guidance eq. 14)."""
        return mean_square(self.flow_map.velocity(jumps.x, jumps.t, jumps.condition) - jumps.v)

    def weigh(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return the loss [B] of squared residuals [B]."""
        return self.weight(square, t, s)


class SelfDistillation(ResidualObjective):
    """A residual of the flow map whose velocity or shorter jumps come from a frozen target (2505.18825).

    Three quarters of a batch have t = s; for the rest (t, s) is uniform on s <= t, as in the authors' code. The target
    there is the network itself, stopped (default_target_ema is 0): an average gained nothing and was sometimes unstable
    (their sec. F.4).

    Args:
        flow_map: the model.
        null_label: refused, as there is no guidance; TVM, whose first term is LSD's, has it.
        stops: where gradients are stopped, one of STOPS; None is the first, the paper's.
        learned_weight: weigh by LearnedWeight, as the paper does for images; then optimise the objective's parameters.

    Raises:
        ValueError: stops that the method does not have; a null label.
    """

    STOPS: ClassVar[tuple[str, ...]] = ("convex", "none")  # the target's part is stopped; nothing is
    has_guidance = False
    needs_equal_times = True
    default_times = TimeSampler("triangle", share_equal=0.75)
    default_target_ema = 0.0

    def __init__(
        self, flow_map: Flow, *, null_label: int | None = None, stops: str | None = None, learned_weight: bool = False
    ):
        stops = self.STOPS[0] if stops is None else stops
        require_one_of("stops", stops, self.STOPS)
        super().__init__(flow_map, null_label=null_label, weight=LearnedWeight() if learned_weight else None)
        self.stops = stops
