"""Sampling in one or several steps (paper, fig. 3)."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tvm_ref.checks import check_sampling, require
from tvm_ref.flow_map import Flow
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, over

Jump = Callable[[Tensor, Tensor, Tensor, Condition | None], Tensor]


def uniform_times(steps: int) -> list[float]:
    """Space times equally, 1 = t_0 > t_1 > ... > t_steps = 0.

    Raises:
        ValueError: fewer than one step.
    """
    require(steps >= 1, f"sampling needs at least one step, got {steps}")
    return [1 - i / steps for i in range(steps + 1)]


@contextlib.contextmanager
def _evaluating(jump: Any) -> Iterator[None]:
    """Put a model into eval mode, where dropout is off, and leave each of its modules as it was."""
    model = getattr(jump, "flow", jump)  # an EulerStep holds a flow
    training = [m for m in model.modules() if m.training] if isinstance(model, nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def sample_path(
    jump: Jump, x1: Sample, times: int | Sequence[float] = 1, condition: Condition | None = None
) -> list[Sample]:
    """Return every state on the way from noise to data, x1 first: arguments and errors are those of `sample`."""
    check_sampling(jump, x1, times)
    # the paper's slice of its grid drops the last time, 0, and with it the last step; ours ends at the data
    grid = uniform_times(times) if isinstance(times, int) else [float(time) for time in times]
    path = [x1]
    with _evaluating(jump):
        for t, s in itertools.pairwise(grid):
            x = path[-1]
            # all samples take the same step; a flow map takes it in one evaluation, however long it is
            path.append(jump(x, x.new_full((len(x),), t), x.new_full((len(x),), s), condition))
    return path


def sample(jump: Jump, x1: Sample, times: int | Sequence[float] = 1, condition: Condition | None = None) -> Sample:
    """Generate samples [B, ...]: carry noise x1 [B, ...] to data by x <- x + f(x, t_i, t_i+1) (fig. 3).

    A model is evaluated in eval mode and without gradients, and keeps the mode that it had.

        sample(model, torch.randn(64, 3, 32, 32))                      # one step
        sample(model, noise, 4)                                        # four equal steps
        sample(model, noise, [1.0, 0.3, 0.0])                          # two steps at chosen times
        sample(model, noise, 1, Condition(labels, 1 / w * torch.ones(64)))  # given classes, with guidance weight w
        sample(EulerStep(model), noise, 50)                            # a model that knows only its velocity

    Args:
        jump: a FlowMap (an average's is `ema.module`), EulerStep, an exact flow's `jump`, or any function called as
            jump(x, t, s, condition).
        x1: noise, the state at times[0], on the model's device.
        times: number of equal steps from 1 to 0 (1 is one-step generation), or a falling grid of times in [0, 1].
        condition: labels and beta, handed to `jump`.

    Raises:
        ValueError: fewer than one step, or a grid that does not fall within [0, 1].
        TypeError: an EMA instead of its .module; a network that is not wrapped in a FlowMap (it returns average
            velocities F, not states); a number of steps that is not an integer; noise that is not a tensor.
    """
    return sample_path(jump, x1, times, condition)[-1]


class EulerStep:
    """The Euler step x + (s - t) u(x, t), for a model that knows only its velocity, as after flow matching."""

    def __init__(self, flow: Flow):
        self.flow = flow

    def __call__(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the state [B, ...] at times s [B]."""
        # a straight line along the velocity at the start: exact only where the flow is straight
        return x + over(s - t, x) * self.flow.velocity(x, t, condition)
