"""What the three self-distillations of 2505.18825 share: LSD, ESD and PSD."""

from typing import ClassVar

from tvm_ref.objectives.base import Flow, ResidualObjective
from tvm_ref.objectives.weights import LearnedWeight
from tvm_ref.time_samplers import TimeSampler


class SelfDistillation(ResidualObjective):
    """A residual of the flow map whose velocity or shorter jumps come from a frozen target (2505.18825).

    Three quarters of a batch lie on the diagonal, and (t, s) is uniform on the triangle, as in the authors' code.

    Args:
        flow_map: the model.
        null_label: refused, as there is no guidance. TVM is LSD with guidance.
        stops: where gradients are stopped, one of STOPS.
        learned_weight: weigh by LearnedWeight, as the paper does; then optimise the objective's parameters.

    Raises:
        ValueError: stops that the method does not have; a null label.
    """

    STOPS: ClassVar[tuple[str, ...]] = ("convex", "none")
    has_guidance = False
    needs_equal_times = True
    default_times = TimeSampler("triangle", share_equal=0.75)

    def __init__(
        self, flow_map: Flow, *, null_label: int | None = None, stops: str = "convex", learned_weight: bool = False
    ):
        if stops not in self.STOPS:
            raise ValueError(f"{type(self).__name__} stops gradients by one of {', '.join(self.STOPS)}; got '{stops}'")
        super().__init__(flow_map, null_label=null_label, weight=LearnedWeight() if learned_weight else None)
        self.stops = stops
