"""Terminal Velocity Matching and its relatives: objectives that learn a flow map, on the same FlowMap.

One file per identity of the flow map (see README.md here); a method is a residual, what is stopped in it, a law of
times and a weight.
"""

from tvm_ref.objectives.base import (
    TERMS,
    Flow,
    LossTerms,
    Objective,
    ResidualObjective,
    guided_target,
    mean_square,
)
from tvm_ref.objectives.eulerian import ESD, ContinuousConsistency, ImprovedMeanFlow, MeanFlow
from tvm_ref.objectives.finite_steps import AlphaFlow, SoFlow
from tvm_ref.objectives.flow_matching import FlowMatching
from tvm_ref.objectives.lagrangian import LSD, PID
from tvm_ref.objectives.semigroup import PSD, Shortcut
from tvm_ref.objectives.tvm import TVM
from tvm_ref.objectives.weights import AdaptiveWeight, LearnedWeight

OBJECTIVES: dict[str, type[Objective]] = {
    "tvm": TVM,
    "fm": FlowMatching,
    "lsd": LSD,
    "pid": PID,
    "esd": ESD,
    "meanflow": MeanFlow,
    "imf": ImprovedMeanFlow,
    "sct": ContinuousConsistency,
    "alphaflow": AlphaFlow,
    "soflow": SoFlow,
    "psd": PSD,
    "shortcut": Shortcut,
}

__all__ = [
    "ESD",
    "LSD",
    "OBJECTIVES",
    "PID",
    "PSD",
    "TERMS",
    "TVM",
    "AdaptiveWeight",
    "AlphaFlow",
    "ContinuousConsistency",
    "Flow",
    "FlowMatching",
    "ImprovedMeanFlow",
    "LearnedWeight",
    "LossTerms",
    "MeanFlow",
    "Objective",
    "ResidualObjective",
    "Shortcut",
    "SoFlow",
    "guided_target",
    "mean_square",
]
