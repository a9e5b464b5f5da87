"""Flow matching (Lipman and others, 2210.02747): only the velocity, from which the whole family starts."""

import torch

from tvm_ref.checks import checked_loss
from tvm_ref.flow_map import Flow
from tvm_ref.guidance import Condition
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives.base import LossTerms, Method, Objective, guided_target, mean_square
from tvm_ref.shapes import Sample
from tvm_ref.time_samplers import Times


class FlowMatching(Objective):
    """Flow matching (eq. 1): ||u(x_s', s') - v||^2. It trains only the velocity.

    With a condition it is eq. 14, weighted by 1/w^2: guided_target replaces v.
    """

    method = Method(
        "fm",
        "flow matching",
        "Flow matching learns only u. Its one step is Euler's, a straight line; d/ds f is u where it starts.",
    )
    learns_jumps = False
    default_target_ema = 0.99  # as in TVM; used only with guidance

    @checked_loss
    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective; of the times only s_prime is used."""
        target = self.flow_map if target is None else target
        x, t = interpolate(x0, x1, times.s_prime), times.s_prime
        # v is random given x_t; the square is smallest at its mean, which is u(x_t, t)
        v = guided_target(conditional_velocity(x0, x1), x, t, condition, self.null_label, target)
        error = mean_square(self.flow_map.velocity(x, t, condition) - v)
        weight = torch.ones_like(t) if condition is None else condition.beta**2  # 1/w^2 (eq. 15)
        return LossTerms(torch.zeros_like(error), weight * error)
