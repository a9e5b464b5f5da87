"""Terminal Velocity Matching and its relatives: objectives that learn a flow map, on the same FlowMap.

One file per identity of the flow map (see README.md here). A method is the two sides of an equation, their
stop-gradients, a distribution of times and a weight. To add one, write a class with its `method` and list it in KINDS.
"""

from tvm_ref.objectives.base import (
    TERMS,
    Jumps,
    LossTerms,
    Method,
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

KINDS: tuple[type[Objective], ...] = (
    TVM,
    LSD,
    PID,
    ESD,
    MeanFlow,
    ImprovedMeanFlow,
    ContinuousConsistency,
    AlphaFlow,
    SoFlow,
    PSD,
    Shortcut,
    FlowMatching,
)
OBJECTIVES = {kind.method.key: kind for kind in KINDS}

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
    "FlowMatching",
    "ImprovedMeanFlow",
    "Jumps",
    "LearnedWeight",
    "LossTerms",
    "MeanFlow",
    "Method",
    "Objective",
    "ResidualObjective",
    "Shortcut",
    "SoFlow",
    "guided_target",
    "mean_square",
]
