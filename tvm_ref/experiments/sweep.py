"""Train many models side by side, one thread each, for compare, seeds and benchmark."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, make_reference
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]
REPORT_EVERY = 50  # steps between a worker's reports of its progress
POLL = 0.5  # seconds between updates of the progress bar
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total} [{elapsed}<{remaining}]"  # tqdm's, for fractions of runs
Report = Callable[[float], object]  # called with the share of a training that has been done since


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(distribution_of(ToyConfig(dist=dist, data=data, bandwidth=bandwidth)), points=points)


def _train(config: ToyConfig, *, measure: Measure, points: int, report: Report | None = None) -> dict[str, Any]:
    """Train and measure one configuration; `report` is None in a worker, which has its own."""
    tell = _report if report is None else report
    reference = _reference(config.dist, config.data, config.bandwidth, points)
    training = Training(config, reference.distribution)
    result = {"dist": config.dist, "objective": config.objective, "lr": config.lr, "seed": config.seed}
    reported = 0

    def up_to(step: int) -> None:
        nonlocal reported
        tell((step - reported) / config.steps)
        reported = step

    try:
        while training.step < config.steps:
            training.train_step()
            if training.step % REPORT_EVERY == 0:
                up_to(training.step)
    except FloatingPointError:
        return result | {"diverged": True, "figures": {}}
    finally:
        up_to(config.steps)
    return result | {"diverged": False, "figures": measure(training, reference)}


_done: Any = None  # in a worker: the number of trainings done by all of them, with fractions, shared between them


def _begin(done: Any) -> None:
    global _done
    _done = done
    use_one_thread()


def _report(share: float) -> None:
    with _done.get_lock():
        _done.value += share


@contextlib.contextmanager
def _workers(jobs: int) -> Iterator[tuple[Any, Any]]:
    """Start processes that ignore Ctrl-C from their first moment, as they inherit it: the parent ends them.

    Yields the pool, and what the workers count their trainings in.
    """
    context = multiprocessing.get_context("spawn")
    done = context.Value("d", 0.0)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        pool = context.Pool(jobs, _begin, (done,))
    finally:
        signal.signal(signal.SIGINT, before)
    with pool:
        yield pool, done


def _train_numbered(numbered: tuple[int, ToyConfig], **options: Any) -> tuple[int, dict[str, Any]]:
    number, config = numbered
    return number, _train(config, **options)


def train_as_finished(
    configs: Sequence[ToyConfig], measure: Measure, *, jobs: int, points: int, label: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Train each configuration and yield its number in `configs` and its result as it finishes; see train_many."""
    train = partial(_train_numbered, measure=measure, points=points)
    with progress(total=len(configs), unit="run", desc=label, bar_format=BAR) as bar:
        if jobs == 1:
            use_one_thread()
            yield from (train(numbered, report=bar.update) for numbered in enumerate(configs))
            return
        with _workers(jobs) as (pool, done):
            results = pool.imap_unordered(train, enumerate(configs))
            for _ in configs:
                finished = None
                while finished is None:
                    with contextlib.suppress(multiprocessing.TimeoutError):
                        finished = results.next(POLL)
                    bar.update(done.value - bar.n)
                yield finished


def train_many(
    configs: Sequence[ToyConfig], measure: Measure, *, jobs: int, points: int, label: str
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order: dist, objective, lr, seed, diverged and `figures`.

    The progress bar moves within trainings, too.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each; 1 is this one.
        points: samples that figures are measured on.
        label: what the progress bar is called.
    """
    waiting: dict[int, dict[str, Any]] = {}
    first = 0
    for number, result in train_as_finished(configs, measure, jobs=jobs, points=points, label=label):
        waiting[number] = result
        while first in waiting:
            yield waiting.pop(first)
            first += 1
