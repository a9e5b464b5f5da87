"""The memory of a step, measured on the CPU: the most that its loss and its backward hold at a time."""

import itertools
import os
from collections.abc import Callable
from typing import Any

import torch

from imagenet.config import Config, build_model
from tvm_ref import EMA, Condition
from tvm_ref.seeding import generator, uniform_numbers


def peak_bytes(work: Callable[[], object]) -> int:
    """Measure the most bytes of tensors that some work has allocated at a time, beyond those that were there."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler writes lines of its own to stderr
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    results: Any = profiler.profiler.kineto_results
    events = [e for e in results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def step_bytes(config: Config) -> int:
    """Measure the peak of the loss of a batch and its backward, gradients of weights included.

    Times are the configuration's, of evenly spread numbers; attention is plain; a curriculum is at its end.
    """
    n, shape = config.batch_size, (config.in_channels, config.input_size, config.input_size)
    model = build_model(config, attention="plain")
    objective, target = config.make_objective(model), EMA(model, 0.99).module
    objective.set_progress(1.0)
    x0, x1 = torch.randn(2, n, *shape, generator=generator(0))
    times = config.sampler().from_uniform(uniform_numbers(n, 4, 0).T)
    condition = Condition(torch.arange(n) % config.classes, torch.full((n,), 1 / config.w))
    return peak_bytes(lambda: objective(x0, x1, times, condition, target).total.mean().backward())
