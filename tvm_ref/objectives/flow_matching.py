"""Flow matching (Lipman and others, 2210.02747): the velocity alone, where all of the family starts."""

import torch

from tvm_ref.guidance import Condition
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives.base import Flow, LossTerms, Objective, check_drawn, guided_target, mean_square
from tvm_ref.shapes import Sample
from tvm_ref.time_samplers import Times


class FlowMatching(Objective):
    """Flow matching (eq. 1): ||u(x_s', s') - v||^2. It trains the velocity alone.

    With a condition it is eq. 14, weighted by 1/w^2: guided_target stands for v.
    """

    learns_jumps = False

    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """See Objective; of the times only s_prime is used."""
        check_drawn(times)
        target = self.flow_map if target is None else target
        x, t = interpolate(x0, x1, times.s_prime), times.s_prime
        v = guided_target(conditional_velocity(x0, x1), x, t, condition, self.null_label, target)
        error = mean_square(self.flow_map.velocity(x, t, condition) - v)
        weight = torch.ones_like(t) if condition is None else condition.beta**2
        return LossTerms(torch.zeros_like(error), weight * error)
