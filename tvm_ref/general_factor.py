"""The general factor gamma(t, s) in place of s - t (paper, appendix A.1)."""

from collections.abc import Callable

import torch
from torch import nn

from tvm_ref.checks import checked
from tvm_ref.flow_map import FlowMap, jvp
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, over

Gamma = Callable[[Time, Time], Time]


class GeneralFactor(FlowMap):
    """The flow map f(x, t, s) = gamma(t, s) F(x, t, s) (eq. 20, appendix A.1).

    MeanFlow and its relatives, which are stated for gamma = s - t, raise ValueError with it.

    Args:
        network: F, see FlowMap.
        gamma: maps times t and s, both [B], to [B], differentiably, with gamma(t, t) = 0.
        scaled: see FlowMap.
    """

    def __init__(self, network: nn.Module, gamma: Gamma, *, scaled: bool = False):
        super().__init__(network, scaled=scaled)
        self.gamma = gamma

    def F(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Raise ValueError, for objectives that are stated for gamma = s - t, where F is the average velocity."""
        raise ValueError("MeanFlow and its relatives are stated only for the factor s - t (eq. 18)")

    @checked
    def displacement(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return f(x, t, s) = gamma(t, s) F(x, t, s) [B, ...] (eq. 20)."""
        return over(self.gamma(t, s), x) * FlowMap.F(self, x, t, s, condition)

    @checked
    def velocity(self, x: Sample, t: Time, condition: Condition | None = None) -> Sample:
        """Return u(x, t) = d/ds f at s = t, which is gamma_s(t, t) F(x, t, t) [B, ...] (eq. 21)."""
        # gamma(t, t) = 0, so of the product rule's two terms only gamma_s F is left
        return over(self._gamma_and_slope(t, t)[1], x) * FlowMap.F(self, x, t, t, condition)

    @checked
    def displacement_and_terminal_velocity(
        self, x: Sample, t: Time, s: Time, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Sample, Sample]:
        """Return f and d/ds f = gamma_s F + gamma dF/ds, both [B, ...], by one JVP in s (eq. 22)."""
        # product rule on f = gamma F; for gamma = s - t, gamma_s = 1
        F, dF_ds = jvp(lambda s: FlowMap.F(self, x, t, s, condition), (s,), (torch.ones_like(s),))
        dF_ds = dF_ds.detach() if detach_jvp else dF_ds
        gamma, gamma_s = (over(a, x) for a in self._gamma_and_slope(t, s))
        return gamma * F, gamma_s * F + gamma * dF_ds

    def _gamma_and_slope(self, t: Time, s: Time) -> tuple[Time, Time]:
        return jvp(lambda s: self.gamma(t, s), (s,), (torch.ones_like(s),))
