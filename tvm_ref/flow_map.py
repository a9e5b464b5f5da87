"""FlowMap: wraps a network F(x, t, s, condition) as a flow map, and gives its velocities."""

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
    """Return value and tangent of a function of tensors: torch.func.jvp for one output, typed."""
    inputs = tuple(a.contiguous() for a in inputs)  # a JVP refuses memory that is shared, as by expand
    # gradients through a JVP of PyTorch's LayerNorm are wrong, and its attention has no JVP: jvp_ready replaces both
    with jvp_ready():
        value, tangent = torch.func.jvp(function, inputs, tangents)[:2]
    return value, tangent


class FlowMap(nn.Module):
    """The displacement f(x, t, s) = (s - t) F(x, t, s) of a network F, and what follows from it.

    The network is called as network(x, t, s, condition) with x [B, ...], times t and s [B] and a Condition or None,
    and returns N [B, ...]; F = N, or w N if `scaled`, is the average velocity over [s, t]. It should embed t and
    t - s, and torch.func.jvp must run through it (so no layer that changes its buffers, as BatchNorm does in training).

    Args:
        network: N.
        scaled: scaled parameterisation (sec. 4): f = (s - t) w N with w = 1/beta, which suits the linear growth of
            the guided velocity in w.

    Every method but F raises TypeError for a condition that is not a Condition and times that are not tensors,
    ValueError for shapes that do not fit, for a missing condition where `scaled` and, on the CPU outside torch.compile,
    for times that break 0 <= s <= t <= 1. There it also warns of beta above 1 and, in training, of a network whose
    output does not depend on s.

    Raises:
        TypeError: a network that is a flow map already, or an EMA; one whose forward does not take these arguments.
    """

    def __init__(self, network: nn.Module, *, scaled: bool = False):
        super().__init__()
        require_network(network)
        self.network = network
        self.scaled = scaled

    @checked_output
    def F(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the average velocity f / (s - t) [B, ...]: the network's F, or w F if `scaled` (sec. 4)."""
        F: Tensor = self.network(x, t, s, condition)
        return F / over(condition.beta, x) if self.scaled and condition is not None else F

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return jump(x, t, s, condition)."""
        return self.jump(x, t, s, condition)

    @checked
    def jump(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Carry x [B, ...] from times t [B] to times s [B]: X = x + f(x, t, s) [B, ...]."""
        return x + self.displacement(x, t, s, condition)  # one evaluation, however far s is from t

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

        Gradients flow through value and tangent. With `detach_jvp` they stop at dF/ds: less time and memory,
        and a bias (sec. 7.4).
        """
        # x and t stand still: only s has a tangent, so value and derivative come from one pass
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

        One JVP. `dt` is the rate of t: 0 leaves only v . grad_x F.
        """
        # the jump's start (x, t) moves along the path, its end s stands still
        return jvp(lambda x, t: self.F(x, t, s, condition), (x, t), (v, torch.full_like(t, dt)))


@runtime_checkable
class Flow(Protocol):
    """The calls of TVM on its flow map and on its target: a FlowMap or the exact flow of a toy distribution."""

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """Return u(x, t) [B, ...], as FlowMap does."""
        ...

    def displacement_and_terminal_velocity(
        self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return f and d/ds f, both [B, ...], as FlowMap does."""
        ...
