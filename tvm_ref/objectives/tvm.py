"""Terminal Velocity Matching (arXiv 2511.19797, eq. 12 and 15)."""

import torch

from tvm_ref.checks import checked_loss
from tvm_ref.flow_map import Flow
from tvm_ref.guidance import Condition
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.objectives.base import LossTerms, Method, Objective, guided_target, mean_square
from tvm_ref.shapes import Sample
from tvm_ref.time_samplers import Times


class TVM(Objective):
    """Terminal Velocity Matching (eq. 12; with a condition eq. 15).

        1/w^2 ( 1{t != s} ||d/ds f(x_t, t, s) - u*(x_t + sg f(x_t, t, s), s)||^2
                + ||u(x_s', s') - [w v + (1 - w) u*(x_s', s', no class)]||^2 )

    where u(x, t) = F(x, t, t) is the model's velocity, u* the target's, sg stops gradients and 1/w^2 is beta^2, for
    each sample. Without a target u* is the model's own velocity, with gradients in the first term but not inside
    guidance. With detach_landing=False as well, and w = 1, this is eq. 9.

    For w = 1 the first term is the Lagrangian self-distillation (LSD) of Boffi, Albergo and Vanden-Eijnden, "How to
    build a consistency model" (2505.18825), which is also trained jointly with flow matching. LSD computes one of the
    two terms for each sample, TVM both. TVM adds the time distribution gap*, the weight 1/w^2 and the scaled
    parameterisation; guidance inside the flow-matching target is MeanFlow's.

    Args:
        flow_map: the model.
        null_label: see Objective.
        detach_jvp: no gradient through dF/ds: cheaper, but biased (sec. 7.4).
        detach_landing: the sg above: no gradient through the landing point, where u* is evaluated (eq. 8).
    """

    method = Method(
        "tvm",
        "TVM",
        "Terminal Velocity Matching trains d/ds f towards u at the landing point, and u by flow matching.",
        sweeps=({}, {"time_sampler": "trunc"}),
        measured_as=(("TVM", {}), ("TVM, JVP detached", {"detach_jvp": True})),
    )
    default_target_ema = 0.99

    def __init__(
        self,
        flow_map: Flow,
        *,
        null_label: int | None = None,
        detach_jvp: bool = False,
        detach_landing: bool = True,
    ):
        super().__init__(flow_map, null_label=null_label)
        self.detach_jvp = detach_jvp
        self.detach_landing = detach_landing

    @checked_loss
    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B] of data x0 and noise x1 [B, ...]; see Objective."""
        # u* is the velocity of a frozen copy, usually the EMA; without one it is the model's own
        target = self.flow_map if target is None else target
        t, s, s_prime = times

        # The jump from t to s: its terminal velocity d/ds f (eq. 17) should be u* where it lands (eq. 8)
        x_t = interpolate(x0, x1, t)
        f, df_ds = self.flow_map.displacement_and_terminal_velocity(x_t, t, s, condition, detach_jvp=self.detach_jvp)
        landing = x_t + (f.detach() if self.detach_landing else f)
        terminal = mean_square(df_ds - target.velocity(landing, s, condition))

        # The boundary s = t, at a time s' of its own: flow matching (eq. 1), with guidance inside its target (eq. 14)
        x_s_prime = interpolate(x0, x1, s_prime)
        # v, or with guidance w v + (1 - w) u*
        v = guided_target(conditional_velocity(x0, x1), x_s_prime, s_prime, condition, self.null_label, target)
        boundary = mean_square(self.flow_map.velocity(x_s_prime, s_prime, condition) - v)

        # Their sum (eq. 12), weighted by 1/w^2 (eq. 15); the first term is masked by 1{t != s}
        weight = torch.ones_like(t) if condition is None else condition.beta**2  # beta = 1/w
        return LossTerms(weight * torch.where(t != s, terminal, 0.0), weight * boundary)
