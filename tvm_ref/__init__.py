"""Terminal Velocity Matching (arXiv 2511.19797): one- and few-step generation from one objective.

Written for x: [B, ...]. Time 0 is data, time 1 is noise; times are tensors [B] with 0 <= s <= t <= 1.
"""

from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition, draw_beta, drop_labels, guided_velocity, without_label
from tvm_ref.interpolant import conditional_velocity, interpolate
from tvm_ref.layers import Linear
from tvm_ref.network_check import NetworkCheck, check_network
from tvm_ref.objectives import OBJECTIVES, PID, TVM, FlowMatching, LossTerms, MeanFlow, guided_target
from tvm_ref.sampling import EulerStep, sample, sample_path, uniform_times
from tvm_ref.time_samplers import TIME_SAMPLERS, Times, TimeSampler

__version__ = "0.2.0"
__all__ = [
    "EMA", "OBJECTIVES", "PID", "TIME_SAMPLERS", "TVM", "Condition", "EulerStep", "FlowMap", "FlowMatching", "Linear",
    "LossTerms", "MeanFlow", "NetworkCheck", "TimeSampler", "Times", "check_network", "conditional_velocity",
    "draw_beta", "drop_labels", "guided_target", "guided_velocity", "interpolate", "sample", "sample_path",
    "uniform_times", "without_label",
]  # fmt: skip
