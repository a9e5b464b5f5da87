"""Objectives of the Eulerian identity: the end of a jump does not change if its start moves along the flow.

    d/dt X + (grad X) u = 0,    residual    F - u - (s - t) D F,    D F = dF/dt + (grad_x F) u

The methods differ in their estimate of u(x, t), in what they detach, and in their weights.
"""

import torch

from tvm_ref.checks import require
from tvm_ref.flow_map import Flow, FlowMap
from tvm_ref.objectives.base import Jumps, Method, ResidualObjective, SelfDistillation, mean_square
from tvm_ref.objectives.weights import AdaptiveWeight
from tvm_ref.shapes import Sample, over
from tvm_ref.time_samplers import TimeSampler


class ESD(SelfDistillation):
    """Eulerian self-distillation (Boffi, Albergo, Vanden-Eijnden, 2505.18825): ||F - u* - (s - t) D F||^2.

    `stops` is one of
        "full": u* and (grad_x F) u* are the target's, detached; gradients flow through F and dF/dt. The paper's
            algorithm 3.
        "convex": u* is the target's, detached; gradients flow through F and D F.
        "none": u* is the model's own, and nothing is detached.
        "all": u* is the target's; gradients flow only through F. Not in the paper; in expectation MeanFlow does the
            same, with the random v for u*.
    """

    method = Method(
        "esd",
        "ESD",
        "Eulerian self-distillation keeps the landing point where it is while the start moves along the flow.",
        sweeps=({}, {"settings": {"stops": "convex"}}, {"settings": {"stops": "convex"}, "target_ema": 0.99}),
        measured_as=(
            ("ESD", {}),
            ("ESD, stops convex", {"stops": "convex"}),
            ("ESD, only F learns", {"stops": "all"}),
        ),
    )
    STOPS = ("full", "convex", "none", "all")

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F - (s - t) D F along the flow, and u where the jump starts."""
        x, _, t, s, _, condition, target = jumps
        # u at the start of the jump is a target: with gradients, jumps would train the velocity (the diagonal s = t)
        if self.stops == "none":
            u = self.flow_map.velocity(x, t, condition)
        else:
            with torch.no_grad():
                u = target.velocity(x, t, condition)
        # "full" splits D F: dF/dt is the model's, with gradients, and the advection (grad_x F*) u* the target's
        along = torch.zeros_like(u) if self.stops == "full" else u
        F, DF = self.flow_map.F_and_total_derivative(x, t, s, along, condition)
        if self.stops == "full":
            # no gradients through grad_x F, by which training diverges, as the authors report
            with torch.no_grad():
                advection = target.F_and_total_derivative(x, t, s, u, condition, dt=0.0)[1]
            DF = DF + advection
        if self.stops == "all":
            DF = DF.detach()
        # F is regressed on the velocity at the start plus what the average changes as the start moves
        return F - over(s - t, F) * DF, u


def mean_flow_sides(flow_map: FlowMap, jumps: Jumps) -> tuple[Sample, Sample]:
    """Return both sides of eq. 18, F(x_t, t, s) and sg(v + (s - t) [v . grad_x F + dF/dt]), both [B, ...]."""
    x, v, t, s, _, condition, _ = jumps
    # v is random given x_t, and so is D F along it: right on average, noisy sample by sample
    F, DF = flow_map.F_and_total_derivative(x, t, s, v, condition)
    # sg: gradients flow through F only, so no derivative of a derivative is needed
    return F, v + over(s - t, F) * DF.detach()


class MeanFlow(ResidualObjective):
    """MeanFlow (Geng and others, 2505.13447; eq. 18): ||F(x_t, t, s) - sg(v + (s - t) [v . grad_x F + dF/dt])||^2.

    The random v replaces u. At t = s the loss is flow matching, so some samples need t = s (in the paper three
    quarters). The paper's adaptive weight moves the minimiser (see AdaptiveWeight); power=0 switches it off.
    Guidance is eq. 14, its sec. 4.2 with kappa = 0; kappa (1/2 in its code's default, .92 for XL) and the interval of t
    where guidance acts are left out.

    Args:
        flow_map: the model.
        null_label: see Objective.
        power: see AdaptiveWeight.
        eps: see AdaptiveWeight.
    """

    method = Method(
        "meanflow",
        "MeanFlow",
        "MeanFlow trains by the velocity where a jump starts; TVM by the velocity where it ends.",
        sweeps=({}, {"settings": {"power": 0.0}}),
        measured_as=(("MeanFlow", {"power": 0}), ("MeanFlow, adaptive weight", {})),
    )
    default_times = TimeSampler("sorted", equal_share=0.75)
    one_term = True

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, power: float = 1.0, eps: float = 1e-3):
        super().__init__(flow_map, null_label=null_label, weight=AdaptiveWeight(power, eps))

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F, and v + (s - t) D F along v, detached."""
        return mean_flow_sides(self.flow_map, jumps)


class ImprovedMeanFlow(MeanFlow):
    """Improved MeanFlow (Geng and others, 2512.02012, eq. 12): V = F + (t - s) sg[dF/dt + (grad_x F) u], ||V - v||^2.

    MeanFlow with the model's own u = F(x_t, t, t) for the direction of the derivative, so that V depends only on x_t
    and v is only the regression target. Half of the paper's batch lies on the diagonal. Guidance is by eq. 14,
    which has the paper's fixed point, with the w that the caller draws (the paper: log-uniform on [1, 8]); its second
    head for u, and guidance within an interval of t, are left out.
    """

    method = Method(
        "imf",
        "improved MeanFlow",
        "Improved MeanFlow trains by the velocity where a jump starts, by its own estimate.",
        sweeps=({}, {"settings": {"power": 0.0}}, {"settings": {"power": 0.0}, "equal_share": 0.25}),
        measured_as=(("improved MeanFlow", {"power": 0}),),
    )
    default_times = TimeSampler("sorted", equal_share=0.5)

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return V = F - (s - t) D F along u, where D F is detached, and v."""
        x, v, t, s, _, condition, _ = jumps
        # one more forward buys a direction without noise; v remains only as the regression target
        with torch.no_grad():
            u = self.flow_map.velocity(x, t, condition)
        F, DF = self.flow_map.F_and_total_derivative(x, t, s, u, condition)
        return F - over(s - t, F) * DF.detach(), v


class ContinuousConsistency(ResidualObjective):
    """Continuous-time consistency training (Lu and Song, 2410.11081, sCT): MeanFlow at s = 0 with a normalised tangent.

        ||F - sg F + sg g / (||g|| + c)||^2,    g = F(x_t, t, 0) - v + t [v . grad_x F + dF/dt]

    g is minus the tangent of the consistency function X(x, t, 0) along the path. Only jumps to s = 0 are trained, so
    sample in one step; samples with t = s, if the times have any, train flow matching, the anchor of FACM
    (2507.03738). Left out are the paper's TrigFlow path, on which the tangent has a factor cos(t) (normalised losses
    differ by 4 to 34 %), the warm-up of the tangent and the learned weight; its distribution of noise levels (CIFAR-10:
    log sigma ~ N(-1, 1.4^2) for data of deviation 1/2) is kept, as logit(t) = log(sigma / deviation).

    Args:
        flow_map: the model.
        null_label: must be None: training from scratch with guidance is not in the paper.
        constant: c > 0; None for no normalisation. ||g|| is the root mean square over elements.
    """

    method = Method(
        "sct",
        "sCT",
        "A continuous-time consistency model jumps only to s = 0: others were never trained.",
        sweeps=({}, {"settings": {"constant": None}}),
        measured_as=(("sCT", {"constant": None}), ("sCT, tangent normalised", {})),
    )
    has_guidance = False
    one_step_only = True
    default_times = TimeSampler("trunc", first=(-0.3, 1.4))  # log(sigma / deviation): -1 - log(1/2) = -0.3
    one_term = True

    def __init__(self, flow_map: Flow, *, null_label: int | None = None, constant: float | None = 0.1):
        super().__init__(flow_map, null_label=null_label)
        require(constant is None or constant > 0, f"the constant must be positive or None, got {constant}")
        self.constant = constant

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F, and F - g / (||g|| + c), detached; s is set to 0 where it is not t."""
        x, v, t, s, _, condition, _ = jumps
        s = torch.where(t == s, s, 0.0)  # a consistency model knows one end, the data
        F, DF = self.flow_map.F_and_total_derivative(x, t, s, v, condition)
        g = (F - v - over(s - t, F) * DF).detach()
        if self.constant is not None:
            # tangents differ in length by orders of magnitude; only their direction is kept, except for the shortest
            g = g / over(mean_square(g).sqrt() + self.constant, g)
        # a square whose gradient in F is 2 g / (||g|| + c), whatever the size of F - its target
        return F, F.detach() - g
