"""Objectives of the Lagrangian identity: a jump ends with the velocity of the point where it lands.

    d/ds X(x, t, s) = u(X(x, t, s), s),    residual    d/ds f(x, t, s) - u(x + f(x, t, s), s)

TVM is one of them, in tvm.py.
"""

import torch
from torch import Tensor

from tvm_ref.checks import checked_loss
from tvm_ref.flow_map import Flow
from tvm_ref.guidance import Condition
from tvm_ref.objectives.base import Jumps, LossTerms, Method, SelfDistillation
from tvm_ref.objectives.tvm import TVM
from tvm_ref.shapes import Sample
from tvm_ref.time_samplers import Times


class LSD(SelfDistillation):
    """Lagrangian self-distillation (Boffi, Albergo, Vanden-Eijnden, 2505.18825; TVM's first term, half a year earlier).

        ||d/ds X(x_t, t, s) - sg u*(sg X(x_t, t, s), s)||^2

    with the target's velocity u* where `stops` is "convex". With "none" u* is the model's own and nothing is detached.
    """

    method = Method(
        "lsd",
        "LSD",
        "Lagrangian self-distillation trains d/ds f towards u at the landing point, as TVM does.",
        sweeps=({}, {"settings": {"learned_weight": True}}),
        measured_as=(("LSD", {}),),
    )

    def sides(self, jumps: Jumps) -> tuple[Sample, Sample]:
        """Return d/ds X(x_t, t, s), and u where the jump lands."""
        x, _, t, s, _, condition, target = jumps
        # the end s moves, the start (x_t, t) is fixed: no derivative in x, through which ESD diverges
        f, df_ds = self.flow_map.displacement_and_terminal_velocity(x, t, s, condition)
        u: Tensor
        if self.stops == "none":
            u = self.flow_map.velocity(x + f, s, condition)
        else:
            # sg: the gradient should change the velocity at the end, not move the end to where u happens to fit
            with torch.no_grad():
                u = target.velocity(x + f, s, condition)
        # neither side contains the random v, so at the solution the loss is zero sample by sample
        return df_ds, u


class PID(TVM):
    """Physics Informed Distillation (eq. 19) of `target`, with flow matching of the model: TVM with every t = 1.

    Given a trained target this is distillation (Tee and others, 2411.08378), also the predictor of FreeFlow
    (2511.19428); given the model's EMA, the joint training of sec. 7.3.
    """

    method = Method(
        "pid",
        "PID",
        "Physics Informed Distillation is TVM whose jumps all start at t = 1: others were never trained.",
        sweeps=({}, {"time_sampler": "trunc"}),
        measured_as=(("PID", {}),),
    )

    @checked_loss
    def forward(
        self, x0: Sample, x1: Sample, times: Times, condition: Condition | None = None, target: Flow | None = None
    ) -> LossTerms:
        """Return the loss terms [B], see Objective; times.t is not used."""
        # one-step sampling starts at t = 1 and nowhere else
        return super().forward(x0, x1, times._replace(t=torch.ones_like(times.t)), condition, target)
