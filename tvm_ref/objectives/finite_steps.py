"""Objectives of the Eulerian identity by a finite step: the start moves from t to r < t along v.

    r = alpha s + (1 - alpha) t,    x_r = x_t - (t - r) v
    residual    F(x_t, t, s) - sg[alpha v + (1 - alpha) F(x_r, r, s)]

The residual over alpha tends to MeanFlow's as alpha -> 0; a finite alpha has a bias of first order in alpha, and needs
no JVP. At alpha = 0, by default from 71 % of training on, alpha-Flow is MeanFlow, with its JVP.
"""

import math

import torch
from torch import Tensor

from tvm_ref.checks import require
from tvm_ref.flow_map import Flow
from tvm_ref.objectives.base import Jumps, Method, ResidualObjective
from tvm_ref.objectives.eulerian import mean_flow_sides
from tvm_ref.objectives.weights import AdaptiveWeight
from tvm_ref.shapes import PerSample, Sample, Time, over
from tvm_ref.time_samplers import TimeSampler


class FiniteStep(ResidualObjective):
    """Base class of both methods: a scalar alpha, which a curriculum moves, and the sides of the residual."""

    has_curriculum = True
    alpha_now: Tensor

    def __init__(self, flow_map: Flow, null_label: int | None, power: float, eps: float):
        super().__init__(flow_map, null_label=null_label)
        adaptive = AdaptiveWeight(power, eps)  # checks both; `weigh` below has them together with alpha
        self.power, self.eps = adaptive.power, adaptive.eps
        # a tensor, so that torch.compile uses one program for every alpha above 0
        self.register_buffer("alpha_now", torch.ones(()), persistent=False)

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F(x_t, t, s), and sg[alpha v + (1 - alpha) F(x_r, r, s)]."""
        x, v, t, s, _, condition, _ = jumps
        alpha = self.alpha_now.to(t.dtype)
        r = (t - alpha * (t - s)).clamp(s, t)  # rounding must not put it outside [s, t]
        # the start moves along the straight path that v belongs to, on which x_r is the sample's x at time r
        x_r = x - over(t - r, x) * v
        # the rest of the jump, from r on, is the model's current estimate; sg, because only the whole jump is corrected
        with torch.no_grad():
            F_r = self.flow_map.F(x_r, r, s, condition)
        # averages over [s, r] and [r, t], each by its fraction of t - s
        return self.flow_map.F(x, t, s, condition), alpha * v + (1 - alpha) * F_r

    def alphas(self, t: Time, s: Time) -> PerSample:
        """Return alpha of each sample [B]; flow matching, at t = s, is alpha = 1."""
        return torch.where(t == s, 1.0, self.alpha_now.to(t.dtype))


class AlphaFlow(FiniteStep):
    """Alpha-Flow (Zhang and others, 2510.20771, definition 1).

        alpha^-1 ||F(x_t, t, s) - sg[alpha v + (1 - alpha) F(x_r, r, s)]||^2

    alpha falls from 1 ("trajectory flow matching") to 0 (MeanFlow) by their algorithm 2, a sigmoid over training that
    is clamped to 1 above 1 - clamp and to 0 below clamp; set_progress moves it. At t = s it is flow matching.
    Guidance: their v~ with kappa = 0, which is eq. 14. The stopped F is the model's own, not its EMA (their table 5a).
    Half of the samples have t = s, as in their runs without guidance; their B/2 with guidance has a quarter, and their
    XL start=0.5, end=0.83 and targets clipped at 4, which are not clipped here.

    Args:
        flow_map: the model.
        null_label: see Objective.
        alpha: a constant alpha instead of the curriculum.
        start: fraction of training where the curriculum starts.
        end: fraction of training where it ends.
        temperature: temperature of the sigmoid, their gamma.
        clamp: their eta.
        power: exponent of the adaptive weight alpha^(2 power - 1) / sg(||.||^2 + eps)^power; theirs is 1; 0 is none.
        eps: see power.

    Raises:
        ValueError: an alpha outside [0, 1], a curriculum that does not fit within training, a temperature that is not
            positive, a clamp outside [0, 0.5], a bad power or eps (see AdaptiveWeight).
    """

    method = Method(
        "alphaflow",
        "alpha-Flow",
        "alpha-Flow trains a jump by one from a point further along; that step shrinks in training.",
        sweeps=({}, {"settings": {"power": 0.0}}, {"settings": {"power": 0.0}, "equal_share": 0.25}),
        measured_as=(
            ("alpha-Flow, alpha 0.5", {"alpha": 0.5, "power": 0}),
            ("alpha-Flow, alpha 0.05", {"alpha": 0.05, "power": 0}),
        ),
    )
    default_times = TimeSampler("sorted", equal_share=0.5)

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        alpha: float | None = None,
        start: float = 0.0,
        end: float = 1.0,
        temperature: float = 25.0,
        clamp: float = 5e-3,
        power: float = 1.0,
        eps: float = 1e-3,
    ):
        super().__init__(flow_map, null_label, power, eps)
        require(alpha is None or 0 <= alpha <= 1, f"alpha must lie in [0, 1], got {alpha}")
        require(0 <= start < end <= 1, f"the curriculum must have 0 <= start < end <= 1, got {start} and {end}")
        require(temperature > 0, f"the curriculum's temperature must be positive, got {temperature}")
        require(0 <= clamp <= 0.5, f"clamp must lie in [0, 0.5], got {clamp}")
        self.constant, self.start, self.end, self.temperature, self.clamp = alpha, start, end, temperature, clamp
        self.set_progress(0.0)

    def alpha(self, progress: float) -> float:
        """Return alpha after a fraction of training (their algorithm 2)."""
        if self.constant is not None:
            return self.constant
        if not self.start < progress < self.end:
            return float(progress <= self.start)
        # a sigmoid, from trajectory flow matching (easy, biased) to MeanFlow (unbiased, noisy)
        centred = (progress - (self.start + self.end) / 2) / (self.end - self.start)
        alpha = (1 - math.tanh(self.temperature * centred / 2)) / 2
        # clamped at both ends: so short a step would be lost in rounding, and near 1 F_r has no weight
        return 1.0 if alpha > 1 - self.clamp else 0.0 if alpha < self.clamp else alpha

    def set_progress(self, progress: float) -> None:
        """Move alpha along its curriculum."""
        alpha = self.alpha(progress)
        self.continuous = alpha == 0  # a Python bool, so that torch.compile compiles this case separately
        self.alpha_now.fill_(alpha)

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return F, and its target by a finite step; at alpha = 0 by MeanFlow's derivative (their algorithm 1)."""
        return mean_flow_sides(self.flow_map, jumps) if self.continuous else super().sides(jumps)

    def weigh(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return alpha^-1 times the square, or their adaptive weight of it [B]."""
        # the residual shrinks as alpha, so alpha^-1 keeps its gradient's size; at alpha = 0 it is MeanFlow's, undivided
        alpha = torch.ones_like(t) if self.continuous else self.alphas(t, s)
        return alpha ** (2 * self.power - 1) * square / (square.detach() + self.eps) ** self.power


class SoFlow(FiniteStep):
    """SoFlow (Luo, Yuan, Liu, 2512.15657): ||X(x_t, t, s) - sg X(x_t + (l - t) v, l, s)||^2 with l = t - alpha (t - s).

    Divided by (t - l)(t - s), as its authors train it, this is alpha-Flow's loss alpha^-1 ||.||^2. alpha falls from
    `first` to `last` exponentially. Three quarters of the paper's data are flow matching, with the same adaptive weight
    1 / sg(||Q||^2 + eps)^power, Q = (X(x_t, t, s) - X(x_l, l, s)) / (t - l). Times are those of its authors' code, in
    which a jump's gradient is half of the square's. Guidance: eq. 14, without its authors' mixing with the model's own
    velocity, which fades above t = .8. They sample n steps by jumping to 0 and adding new noise; here jumps are
    composed.

    Args:
        flow_map: the model.
        null_label: see Objective.
        first: alpha at the start of training.
        last: alpha at the end.
        power: exponent of the adaptive weight.
        eps: see power.

    Raises:
        ValueError: unless 0 < last <= first <= 1; a bad power or eps (see AdaptiveWeight).
    """

    method = Method(
        "soflow",
        "SoFlow",
        "SoFlow trains a jump by one from a point further along; that step shrinks in training.",
        sweeps=({}, {"settings": {"power": 0.0}}),
        measured_as=(("SoFlow, alpha 0.002", {"first": 0.002, "last": 0.002, "power": 0}),),
    )
    default_times = TimeSampler("soflow", equal_share=0.75)

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        first: float = 0.1,
        last: float = 2e-3,
        power: float = 1.0,
        eps: float = 1e-2,
    ):
        super().__init__(flow_map, null_label, power, eps)
        require(0 < last <= first <= 1, f"alpha must fall within (0, 1]; got first {first}, last {last}")
        self.first, self.last = first, last
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Move alpha from `first` to `last`."""
        # its bias is of the order of alpha; equal factors per step spend as long on each order of magnitude
        self.alpha_now.fill_(self.first * (self.last / self.first) ** progress)

    def weigh(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return alpha^-1 square / sg(||Q||^2 + eps)^power [B], ||Q||^2 = square / alpha^2."""
        alpha = self.alphas(t, s)
        # Q is the residual divided by the step, of one size for all alpha, so that eps always means the same
        return square / alpha / ((square / alpha**2).detach() + self.eps) ** self.power
