"""Base classes of all objectives: loss terms, guidance, and methods with one residual per sample.

Every objective is a module, called as objective(x0, x1, times, condition, target), that returns LossTerms. The JVP runs
inside its forward, so DDP, FSDP and torch.compile can wrap the whole.
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
    """Metadata of an objective, from which tables and command-line choices are built.

    Attributes:
        key: its name on a command line.
        title: its name in tables and figures.
        summary: one sentence on what trains its jumps.
        sweeps: the toy options that experiments/compare.py tries; the first is the method's default.
        measured_as: the variants that experiments/family.py measures, as (name, settings); without adaptive weights
            unless the settings name them.
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
        jump: [B] the term that trains jumps (zero for flow matching).
        flow_matching: [B] the term that trains the velocity (zero for MeanFlow, whose single term does both).
    """

    jump: PerSample
    flow_matching: PerSample

    @property
    def total(self) -> PerSample:
        """The loss of each sample [B]; training minimises its mean."""
        return self.jump + self.flow_matching  # equal weights, as in eq. 12

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
    return a.flatten(1).square().mean(1)  # a mean, so that losses of 2D points and of images are of the same size


def guided_target(
    v: Sample, x: Sample, t: Time, condition: Condition | None, null_label: int | None, target: Flow
) -> Sample:
    """Return the target of flow matching (eq. 14): w v + (1 - w) u*(x, t, no class, beta = 1), or v without guidance.

    u* is the target's velocity, detached. There is no guidance without a condition or a null label.
    """
    if condition is None or null_label is None:
        return v
    # v = x1 - x0 belongs to a sample of one class, so the unconditional velocity must come from the target; with
    # gradients the guided loss would train it, too
    with torch.no_grad():
        unconditional = target.velocity(x, t, without_label(condition, null_label))
    return guided_velocity(v, unconditional, condition.beta)


class Objective(nn.Module):
    """Base of all objectives: holds the flow map to train and the null label for guidance.

    An objective may have parameters of its own (see LearnedWeight), so optimise objective.parameters().

    Args:
        flow_map: the model, or an exact flow, whose loss is the least possible.
        null_label: the label that means "no class"; None if w = 1 throughout, which saves a call of the target.

    Attributes:
        method: its Method.
        learns_jumps: whether f(x, t, s) is trained for s < t; if not, sampling takes Euler steps (see stepper).
        one_step_only: whether only jumps to s = 0 are trained, so that only one-step samples make sense.
        has_guidance: whether guidance (classifier-free, inside the target) is implemented for the method.
        has_curriculum: whether set_progress changes the loss during training.
        default_times: the time sampler of the method's paper.
        default_target_ema: EMA decay of the target's weights in the method's paper; 0: the target is the model itself,
            or the method uses none.
        needs_equal_times: whether v enters the loss only where t = s; then some samples must have t = s.

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
    default_target_ema: ClassVar[float] = 0.0
    needs_equal_times: ClassVar[bool] = False

    def __init__(self, flow_map: Flow, *, null_label: int | None = None):
        super().__init__()
        check_objective(type(self), flow_map, null_label)
        self.flow_map = flow_map
        self.null_label = null_label

    @property
    def learned_weight(self) -> nn.Module:
        """The learned weight of the loss, to save with the model; a module without parameters if there is none."""
        weight = getattr(self, "weight", None)  # a plain function unless it is learned
        return weight if isinstance(weight, nn.Module) else nn.Module()

    @classmethod
    def make_times(
        cls, times: TimeSampler | None = None, equal_share: float | None = None, noise_share: float = 0.0
    ) -> TimeSampler:
        """Return the time sampler to train this method with.

        Args:
            times: the sampler to take, except for its fractions; default_times if None.
            equal_share: fraction of samples with t = s; that of default_times if None.
            noise_share: fraction of samples with t = 1.

        Raises:
            ValueError: bad fractions (see TimeSampler), or no samples with t = s for a method that needs them.
        """
        times = times or cls.default_times
        equal_share = cls.default_times.equal_share if equal_share is None else equal_share
        times = replace(times, equal_share=equal_share, noise_share=noise_share)
        # LSD, ESD and PSD compare the model with itself, and v enters only where t = s. Without such samples the flow
        # map of any velocity field would have zero loss
        meets_data = times.draws_equal_times or not cls.needs_equal_times
        require(meets_data, f"{cls.__name__} meets the data only where t = s: equal_share must be above 0")
        return times

    @classmethod
    def stepper(cls, flow_map: FlowMap) -> Jump:
        """Return the step to sample with: the flow map's jump, or an Euler step if jumps were not trained."""
        return flow_map if cls.learns_jumps else EulerStep(flow_map)  # F(x, t, s) for s < t was never trained

    def set_progress(self, progress: float) -> None:
        """Set the fraction of training that is done, before each step; only objectives with a curriculum use it."""

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B] of data x0 and noise x1, both [B, ...], at times drawn by a TimeSampler.

        `target` is a flow map whose parameters the caller has frozen, usually the module of an EMA of the model; None
        means the model itself. Warnings name data that are NaN or far out and, after 200 losses, a target that is
        missing or never updated, and guidance without dropped labels.

        Raises:
            ValueError: shapes that do not fit, times that violate 0 <= s <= t <= 1, labels that are not classes,
                guidance without a null label, a null label without a condition.
            TypeError: times that are not a Times, data of integers, a target that is not a flow map.
        """
        raise NotImplementedError


class Jumps(NamedTuple):
    """A batch of jumps: the arguments of a method's residual.

    Attributes:
        x: [B, ...] the points x_t where jumps start.
        v: [B, ...] the velocity x1 - x0 of each sample, or with guidance the target of eq. 14.
        t: [B] start times.
        s: [B] end times.
        s_prime: [B] third times, which some methods use.
        condition: labels and beta, or None.
        target: the caller's frozen flow map, or the model itself.
    """

    x: Sample
    v: Sample
    t: Time
    s: Time
    s_prime: Time
    condition: Condition | None
    target: FlowMap

    def at(self, rows: Tensor) -> "Jumps":
        """Return the jumps at some rows (indices) of the batch."""
        x, v, t, s, s_prime = (a[rows] for a in self[:5])
        condition = None if self.condition is None else Condition(*(a[rows] for a in self.condition))
        return Jumps(x, v, t, s, s_prime, condition, self.target)


class ResidualObjective(Objective):
    """An objective with one weighted squared residual per sample: the method's equation if s < t, else flow matching.

    A subclass defines `sides`, with its stop-gradients, `default_times` and a `weight`. With guidance, guided_target
    replaces v. As in the papers of the methods that have guidance here, its unconditional velocity is the model's own
    and the square has no weight 1/w^2; TVM uses the target's velocity and has that weight.

    Args:
        flow_map: the model.
        null_label: see Objective.
        weight: maps squares to losses (see weights.py); None: no weight.
    """

    flow_map: FlowMap
    one_term: ClassVar[bool] = False  # report all of the loss as `jump`, even where t = s

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, weight: Weight | None = None):
        super().__init__(flow_map, null_label=null_label)
        self.weight: Weight = unweighted if weight is None else weight

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return both sides of the method's equation, each [B, ...]; the loss is the square of their difference.

        They carry the method's stop-gradients. At t = s the first side must be F(x, t, t).
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
        # each sample counts in one term and is zero in the other, so the means of both add up to the mean loss
        return LossTerms(torch.where(t != s, loss, 0.0), torch.where(t != s, 0.0, loss))

    def square(self, jumps: Jumps) -> PerSample:
        """Return the squared residual [B]: the method's equation where t != s, flow matching where t = s."""
        equal = jumps.t == jumps.s
        if not has_values(equal):
            # torch.compile needs shapes that do not depend on the times, so every sample is computed as a jump. At
            # t = s its left side is the velocity F(x, t, t), which is regressed on v
            left, right = self.sides(jumps)
            return mean_square(left - torch.where(over(equal, right), jumps.v, right))
        # a jump costs two or three times as much as flow matching, so each sample gets only what it needs
        squares, order = [], []
        for rows, square in ((~equal, self.square_of_jumps), (equal, self.square_of_velocity)):
            index = rows.nonzero()[:, 0]
            if len(index) or (torch.distributed.is_available() and torch.distributed.is_initialized()):
                # every process must call the network the same number of times, because each call of FSDP gathers the
                # weights: a process without such a sample computes one anyway and drops it
                used = index if len(index) else index.new_zeros(1)
                squares.append(square(jumps.at(used))[: len(index)])
                order.append(index)
        return torch.cat(squares)[torch.cat(order).argsort()]

    def square_of_jumps(self, jumps: Jumps) -> PerSample:
        """Return the mean square [B] of the difference of both sides."""
        left, right = self.sides(jumps)
        return mean_square(left - right)

    def square_of_velocity(self, jumps: Jumps) -> PerSample:
        """Return the flow-matching loss [B] (eq. 1, with guidance eq. 14)."""
        return mean_square(self.flow_map.velocity(jumps.x, jumps.t, jumps.condition) - jumps.v)

    def weigh(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return losses [B] from squared residuals [B]."""
        return self.weight(square, t, s)


class SelfDistillation(ResidualObjective):
    """Self-distillation (2505.18825): the residual's velocity or shorter jumps come from a target.

    As in the authors' code, three quarters of a batch have t = s, and for the rest (t, s) is uniform on s <= t. Their
    target is the network itself, detached (default_target_ema is 0): an EMA gained nothing and was sometimes unstable
    (their sec. F.4).

    Args:
        flow_map: the model.
        null_label: must be None: these methods have no guidance here; TVM, whose first term is LSD's, does.
        stops: which stop-gradients to use, one of STOPS; None: the first, the paper's.
        learned_weight: weigh by LearnedWeight, as the paper does for images; then optimise the objective's parameters.

    Raises:
        ValueError: `stops` is not one of STOPS, or a null label is given.
    """

    STOPS: ClassVar[tuple[str, ...]] = ("convex", "none")  # detach the target's part; detach nothing
    has_guidance = False
    needs_equal_times = True
    default_times = TimeSampler("triangle", equal_share=0.75)

    def __init__(
        self, flow_map: Flow, *, null_label: int | None = None, stops: str | None = None, learned_weight: bool = False
    ):
        stops = self.STOPS[0] if stops is None else stops
        require_one_of("stops", stops, self.STOPS)
        super().__init__(flow_map, null_label=null_label, weight=LearnedWeight() if learned_weight else None)
        self.stops = stops
