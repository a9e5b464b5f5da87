"""Train many models side by side, one thread each, for compare and seeds."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from multiprocessing.pool import Pool
from typing import Any

from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, make_reference
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(ToyConfig(dist=dist, data=data, bandwidth=bandwidth).make_distribution(), points=points)


def train_and_measure(config: ToyConfig, measure: Measure, points: int) -> dict[str, Any]:
    """Train one configuration; return dist, objective, lr, seed, diverged and, if it did not, its metrics."""
    reference = _reference(config.dist, config.data, config.bandwidth, points)
    training = Training(config, reference.distribution)
    result = {"dist": config.dist, "objective": config.objective, "lr": config.lr, "seed": config.seed}
    try:
        while training.step < config.steps:
            training.train_step()
    except FloatingPointError:
        return result | {"diverged": True, "figures": {}}
    return result | {"diverged": False, "figures": measure(training, reference)}


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[Pool]:
    """Start processes that ignore Ctrl-C from their first moment, as they inherit it: the parent ends them."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = multiprocessing.get_context("spawn").Pool(jobs, use_one_thread)
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool


def train_many(
    configs: Sequence[ToyConfig], measure: Measure, *, jobs: int, points: int, label: str
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order; see train_and_measure.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each; 1 is this one.
        points: samples that errors are measured on.
        label: name of the progress bar, which moves by one for each training.
    """
    train = partial(train_and_measure, measure=measure, points=points)
    with contextlib.ExitStack() as stack:
        if jobs == 1:
            use_one_thread()
            results: Iterator[dict[str, Any]] = map(train, configs)
        else:
            results = stack.enter_context(_workers(jobs)).imap(train, configs)
        yield from progress(results, total=len(configs), unit="run", desc=label)
