"""Sampling in one or several steps (paper, fig. 3)."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tvm_ref.ema import EMA
from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.objectives import OBJECTIVES, Flow
from tvm_ref.shapes import Sample, Time, over

Jump = Callable[[Tensor, Tensor, Tensor, Condition | None], Tensor]


def uniform_times(steps: int) -> list[float]:
    """Space times equally, 1 = t_0 > t_1 > ... > t_steps = 0.

    Raises:
        ValueError: fewer than one step.
    """
    if steps < 1:
        raise ValueError(f"sampling needs at least one step, got {steps}")
    return [1 - i / steps for i in range(steps + 1)]


@torch.no_grad()
def sample_path(
    jump: Jump, x1: Sample, times: int | Sequence[float] = 1, condition: Condition | None = None
) -> list[Sample]:
    """Carry noise x1 [B, ...] to data by x <- x + f(x, t_i, t_i+1) (fig. 3); return the states of the grid.

    Args:
        jump: called as jump(x, t, s, condition): a FlowMap, an exact flow's `jump`, or EulerStep.
        x1: noise, the state at times[0].
        times: number of equal steps from 1 to 0 (1 is one-step generation), or a falling grid of times in [0, 1].
        condition: labels and beta, handed to `jump`.

    Raises:
        ValueError: fewer than one step, or a grid that does not fall within [0, 1].
        TypeError: an EMA, whose .module is meant; a network that is not wrapped in a FlowMap: it gives average
            velocities F, not states. A number of steps that is no whole number.
    """
    if isinstance(jump, EMA):
        raise TypeError("an EMA holds a model and is none: sample from its .module")
    if isinstance(jump, nn.Module) and not hasattr(jump, "displacement"):
        raise TypeError(f"{type(jump).__name__} is a network, not a flow map; wrap it: FlowMap(network)")
    if isinstance(times, float):
        raise TypeError(f"times must be a number of steps, as 1, or a grid, as [1.0, 0.5, 0.0]; got {times}")
    grid = uniform_times(times) if isinstance(times, int) else [float(a) for a in times]
    if len(grid) < 2 or not all(1 >= a > b >= 0 for a, b in itertools.pairwise(grid)):
        raise ValueError(f"a time grid must fall strictly within [0, 1] and hold at least two times, got {grid}")
    path = [x1]
    for t, s in itertools.pairwise(grid):
        x = path[-1]
        path.append(jump(x, x.new_full((len(x),), t), x.new_full((len(x),), s), condition))
    return path


def sample(jump: Jump, x1: Sample, times: int | Sequence[float] = 1, condition: Condition | None = None) -> Sample:
    """Return the last state of sample_path: samples [B, ...] of the data."""
    return sample_path(jump, x1, times, condition)[-1]


class EulerStep:
    """x + (s - t) u(x, t): how a model that knows only its velocity, as after flow matching, takes a step."""

    def __init__(self, flow: Flow):
        self.flow = flow

    def __call__(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the state [B, ...] at times s [B]."""
        return x + over(s - t, x) * self.flow.velocity(x, t, condition)


def stepper(flow_map: FlowMap, objective: str) -> Jump:
    """Choose how a model trained with an objective takes a step: a jump, or, where it learned none, Euler's."""
    return flow_map if OBJECTIVES[objective].learns_jumps else EulerStep(flow_map)
