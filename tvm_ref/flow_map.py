"""FlowMap: any network F(x, t, s, condition) read as a map along the flow, with its velocity at both ends."""

import inspect
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tvm_ref.ema import EMA
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, check_batch, check_times, over, values_are_cheap

# PyTorch's first JVP of a process uses torch.jit.script itself, and warns its caller of it
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")


class Factor(NamedTuple):
    """The scalar factor gamma(t, s) of f = gamma(t, s) F (eq. 20, appendix A.1), with gamma(t, t) = 0.

    Both functions map times [B], [B] to [B].
    """

    gamma: Callable[[Tensor, Tensor], Tensor]
    gamma_ds: Callable[[Tensor, Tensor], Tensor]  # d gamma / ds


BLIND = 5  # steps of training after which a network that does not depend on s is told: a DiT does from its third on

DIFFERENCE = Factor(gamma=lambda t, s: s - t, gamma_ds=lambda t, s: torch.ones_like(s))  # eq. 4


def jvp(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return value and tangent of a function of tensors: torch.func.jvp, with the type of its result narrowed.

    Raises:
        NotImplementedError, RuntimeError: layers without a JVP, with what to take instead.
    """
    if torch.compiler.is_compiling():
        result = torch.func.jvp(function, inputs, tangents)
        return result[0], result[1]
    try:
        result = torch.func.jvp(function, inputs, tangents)
    except NotImplementedError as error:
        if "scaled_dot_product" not in str(error):
            raise
        raise NotImplementedError(
            "PyTorch's scaled_dot_product_attention has no JVP; take jvp_attention.attention, which has "
            "(kernels/jvp_attention/README.md)"
        ) from error
    except RuntimeError as error:
        if "in-place operation" not in str(error):
            raise
        raise RuntimeError(
            "the network changes a buffer in its forward, as BatchNorm does in training, and no JVP runs through that; "
            "take a norm without running statistics, as GroupNorm or LayerNorm"
        ) from error
    return result[0], result[1]


def check_call(network: nn.Module) -> None:
    """Raise TypeError unless the network's forward takes (x, t, s, condition)."""
    forward = getattr(network, "forward", network)
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # of compiled code
        return
    try:
        signature.bind("x", "t", "s", "condition")
    except TypeError:
        raise TypeError(
            f"the network is called as network(x, t, s, condition); {type(network).__name__}.forward takes {signature}"
        ) from None


class FlowMap(nn.Module):
    """The displacement f(x, t, s) = (s - t) F(x, t, s) of a network F, and what follows from it.

    The network is called as network(x, t, s, condition) with x [B, ...], times t and s [B] and a Condition or None,
    and returns F [B, ...], the average velocity over [s, t]. It should embed t and t - s, and torch.func.jvp must run
    through it (so no layer that changes its buffers, as BatchNorm does in training).

    Args:
        network: F.
        scaled: scaled parameterisation (sec. 4): f = (s - t) w F with w = 1/beta, which suits the linear growth of
            the guided velocity in w.
        factor: gamma(t, s) in place of s - t (appendix A.1).

    Every method raises TypeError for a condition that is no Condition and times that are no tensors, ValueError for
    shapes that do not fit, for a missing condition where `scaled` and, on the CPU outside torch.compile, for times that
    break 0 <= s <= t <= 1. There it also warns of beta above 1 and, in training, of a network whose output does not
    depend on s.

    Raises:
        TypeError: a network that is a flow map already, or an EMA; one whose forward does not take these arguments.
    """

    def __init__(self, network: nn.Module, *, scaled: bool = False, factor: Factor = DIFFERENCE):
        super().__init__()
        if isinstance(network, FlowMap | EMA):
            raise TypeError(f"a FlowMap is made around a network itself, got {type(network).__name__}")
        check_call(network)
        self.network = network
        self.scaled = scaled
        self.factor = factor
        self._reads_s = False  # whether the network was seen to depend on s, or it was said that it does not
        self._blind = 0  # steps of training that it was seen not to

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Do the same as jump."""
        return self.jump(x, t, s, condition)

    def jump(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Carry x [B, ...] from times t [B] to times s [B]: x + f(x, t, s) [B, ...]."""
        return x + self.displacement(x, t, s, condition)

    def displacement(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the net displacement f(x, t, s) = gamma(t, s) F(x, t, s) [B, ...] (eq. 4 and 20)."""
        self._check(x, t, s, condition)
        return self._scale(self.factor.gamma(t, s), x, condition) * self._average_velocity(x, t, s, condition)

    def velocity(self, x: Sample, t: Time, condition: Condition | None = None) -> Sample:
        """Return the velocity u(x, t) = d/ds f(x, t, s) at s = t [B, ...]: F(x, t, t) (eq. 4), or eq. 21."""
        self._check(x, t, t, condition)
        return self._scale(self.factor.gamma_ds(t, t), x, condition) * self._average_velocity(x, t, t, condition)

    def displacement_and_terminal_velocity(
        self, x: Sample, t: Time, s: Time, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Sample, Sample]:
        """Return f(x, t, s) and d/ds f(x, t, s), both [B, ...], by one JVP in s (eq. 17 and 22, fig. 11).

        Gradients flow through value and tangent. With `detach_jvp` they stop at dF/ds: cheaper, biased (sec. 7.4).
        """
        self._check(x, t, s, condition)
        s = s.contiguous()  # a JVP refuses memory that is shared, as by expand
        F, dF_ds = jvp(lambda s: self._average_velocity(x, t, s, condition), (s,), (torch.ones_like(s),))
        self._warn_if_blind(F, dF_ds, t, s)
        if detach_jvp:
            dF_ds = dF_ds.detach()
        gamma = self._scale(self.factor.gamma(t, s), x, condition)
        gamma_ds = self._scale(self.factor.gamma_ds(t, s), x, condition)
        return gamma * F, gamma_ds * F + gamma * dF_ds

    def average_velocity(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the average velocity f / (s - t) [B, ...]: F(x, t, s) (eq. 4), or w F in the scaled parameterisation.

        Raises:
            ValueError: also for a factor other than s - t.
        """
        self._check_difference()
        self._check(x, t, s, condition)
        return self._scale(torch.ones_like(t), x, condition) * self._average_velocity(x, t, s, condition)

    def average_velocity_and_total_derivative(
        self, x: Sample, t: Time, s: Time, v: Sample, condition: Condition | None = None, *, dt: float = 1.0
    ) -> tuple[Sample, Sample]:
        """Return F(x, t, s) and v . grad_x F + dF/dt, its derivative along a path of velocity v [B, ...] (eq. 18).

        One JVP. `dt` is the rate of t: 0 leaves v . grad_x F alone.

        Raises:
            ValueError: also for a factor other than s - t, for which eq. 18 is not stated.
        """
        self._check_difference()
        self._check(x, t, s, condition)
        x, t = x.contiguous(), t.contiguous()  # a JVP refuses memory that is shared, as by expand
        tangents = (v, torch.full_like(t, dt))
        F, dF_dt = jvp(lambda x, t: self._average_velocity(x, t, s, condition), (x, t), tangents)
        w = self._scale(torch.ones_like(t), x, condition)
        return w * F, w * dF_dt

    def _check_difference(self) -> None:
        if self.factor.gamma is not DIFFERENCE.gamma:  # a copy of the tuple, as EMA makes, is another tuple
            raise ValueError("MeanFlow (eq. 18) and its relatives are stated for the factor s - t alone")

    def _average_velocity(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Tensor:
        F = self.network(x, t, s, condition)
        if F.shape != x.shape:
            raise ValueError(f"the network must return the shape of x, {list(x.shape)}; it returned {list(F.shape)}")
        return F

    def _scale(self, a: Tensor, x: Tensor, condition: Condition | None) -> Tensor:
        """Shape a [B], times w = 1/beta in the scaled parameterisation, to broadcast over x."""
        return over(a / condition.beta if self.scaled and condition is not None else a, x)

    def _check(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> None:
        if condition is not None and not isinstance(condition, Condition):
            raise TypeError(
                f"the condition must be Condition(label, beta) with beta = 1/w, ones without guidance; "
                f"got {type(condition).__name__}"
            )
        if condition is None and self.scaled:
            raise ValueError("a scaled flow map, f = (s - t) w F, needs a condition: Condition(label, beta=1/w)")
        check_batch(x, t, s, *(condition or ()))
        check_times(t, s)
        if condition is not None and values_are_cheap(x) and bool((condition.beta > 1).any()):
            warnings.warn("beta = 1/w is above 1, a guidance weight w below 1; was w meant?", stacklevel=4)

    def _warn_if_blind(self, F: Tensor, dF_ds: Tensor, t: Tensor, s: Tensor) -> None:
        if self._reads_s or not F.requires_grad or not values_are_cheap(F):
            return
        self._reads_s = bool(dF_ds.any())
        if self._reads_s or not bool(F.any()) or not bool((s < t).any()):
            return
        self._blind += 1
        if self._blind == BLIND:
            self._reads_s = True  # said once
            told = "the network's output does not depend on s: it can learn no jumps unless it embeds s or t - s"
            warnings.warn(told, stacklevel=4)
