"""Wrap a network F(x, t, s, condition) as a flow map, with its velocities and derivatives."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from jvp_attention import jvp_ready
from tvm_ref.checks import checked, checked_output, require_network, warns_if_blind
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, over


def jvp(
    function: Callable[..., Tensor], inputs: tuple[Tensor, ...], tangents: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Return the value of a function of tensors and its JVP with the tangents: torch.func.jvp for one output."""
    inputs = tuple(a.contiguous() for a in inputs)  # JVPs refuse expanded tensors, whose elements share memory
    # gradients through a JVP of PyTorch's LayerNorm are wrong, and its attention has no JVP: jvp_ready replaces both
    with jvp_ready():
        value, tangent = torch.func.jvp(function, inputs, tangents)[:2]
    return value, tangent


class FlowMap(nn.Module):
    """A flow map with displacement f(x, t, s) = (s - t) F(x, t, s): it carries x from time t to time s <= t.

    The network is called as network(x, t, s, condition) with x [B, ...], times t and s [B] and a Condition or None, and
    returns F [B, ...], the average velocity between t and s, or F / w if `scaled`. It should embed t and t - s.
    torch.func.jvp must run through it, so no layer may change its buffers, as BatchNorm does in training.

    Args:
        network: the network.
        scaled: scaled parameterisation (sec. 4): f = (s - t) w network(...) with w = 1/beta, because the guided
            velocity grows linearly in w.

    Every method except F raises TypeError for a condition that is not a Condition and for times that are not tensors,
    and ValueError for shapes that do not fit, for a missing condition if `scaled` and, on the CPU outside
    torch.compile, for times that violate 0 <= s <= t <= 1. There they also warn of beta above 1 and, in training, of a
    network whose output does not depend on s.

    Raises:
        TypeError: the network is already a FlowMap or is an EMA, or its forward does not take these four arguments.
    """

    def __init__(self, network: nn.Module, *, scaled: bool = False):
        super().__init__()
        require_network(network)
        self.network = network
        self.scaled = scaled

    @checked_output
    def F(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the average velocity f / (s - t) [B, ...]: the network's output, times w if `scaled` (sec. 4)."""
        F: Tensor = self.network(x, t, s, condition)
        return F / over(condition.beta, x) if self.scaled and condition is not None else F  # beta = 1/w

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return jump(x, t, s, condition)."""
        return self.jump(x, t, s, condition)

    @checked
    def jump(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Carry x [B, ...] from times t [B] to times s [B]: X = x + f(x, t, s) [B, ...]."""
        return x + self.displacement(x, t, s, condition)  # one call of the network, however far s is from t

    @checked
    def displacement(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the net displacement f(x, t, s) = (s - t) F(x, t, s) [B, ...] (eq. 4)."""
        return over(s - t, x) * self.F(x, t, s, condition)

    @checked
    def velocity(self, x: Sample, t: Time, condition: Condition | None = None) -> Sample:
        """Return the velocity u(x, t) = d/ds f(x, t, s) at s = t [B, ...], which is F(x, t, t) (eq. 4)."""
        return self.F(x, t, t, condition)

    @checked
    @warns_if_blind
    def displacement_and_terminal_velocity(
        self, x: Sample, t: Time, s: Time, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Sample, Sample]:
        """Return f(x, t, s) and d/ds f = F + (s - t) dF/ds, both [B, ...], by one JVP in s (eq. 17, fig. 11).

        Gradients flow through both. With `detach_jvp` none flows through dF/ds, which saves time and memory but biases
        the gradient (sec. 7.4).
        """
        # x and t are constants: only s has a tangent (of one), so a single pass gives F and dF/ds
        F, dF_ds = jvp(lambda s: self.F(x, t, s, condition), (s,), (torch.ones_like(s),))
        if detach_jvp:
            dF_ds = dF_ds.detach()
        # product rule on f = (s - t) F
        return over(s - t, x) * F, F + over(s - t, x) * dF_ds

    @checked
    def F_and_total_derivative(
        self, x: Sample, t: Time, s: Time, v: Sample, condition: Condition | None = None, *, dt: float = 1.0
    ) -> tuple[Sample, Sample]:
        """Return F(x, t, s) and v . grad_x F + dF/dt, its derivative along a path of velocity v [B, ...] (eq. 18).

        By one JVP. `dt` is the tangent of t; 0 leaves only v . grad_x F.
        """
        # the jump's start (x, t) moves along the path; its end s is fixed
        return jvp(lambda x, t: self.F(x, t, s, condition), (x, t), (v, torch.full_like(t, dt)))


@runtime_checkable
class Flow(Protocol):
    """The methods that TVM calls on its model and target: a FlowMap, or the exact flow of a toy distribution."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return the velocity u(x, t) [B, ...]; see FlowMap."""
        ...

    def displacement_and_terminal_velocity(
        self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return f and d/ds f, both [B, ...]; see FlowMap."""
        ...
