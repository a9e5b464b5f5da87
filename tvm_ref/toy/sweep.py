"""Train many models side by side, one thread each, for compare, seeds and benchmark."""

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

from tqdm import tqdm

from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.metrics import Reference, make_reference
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]
REPORT_EVERY = 50  # steps between a worker's reports of its progress
POLL = 0.5  # seconds between updates of the progress bar

_done: Any = None  # in a worker: the number of trainings done by all workers, with fractions, shared between them


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(distribution_of(ToyConfig(dist=dist, data=data, bandwidth=bandwidth)), points=points)


def _begin(done: Any) -> None:
    global _done
    _done = done
    use_one_thread()


def _report(steps: int, config: ToyConfig) -> None:
    with _done.get_lock():
        _done.value += steps / config.steps


def _train(config: ToyConfig, measure: Measure, points: int) -> dict[str, Any]:
    reference = _reference(config.dist, config.data, config.bandwidth, points)
    training = Training(config, reference.distribution)
    result = {"dist": config.dist, "objective": config.objective, "lr": config.lr, "seed": config.seed}
    try:
        while training.step < config.steps:
            training.train_step()
            if training.step % REPORT_EVERY == 0:
                _report(REPORT_EVERY, config)
        _report(training.step % REPORT_EVERY, config)
    except FloatingPointError:
        _report(config.steps - training.step // REPORT_EVERY * REPORT_EVERY, config)
        return result | {"diverged": True, "figures": {}}
    return result | {"diverged": False, "figures": measure(training, reference)}


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


def train_many(
    configs: Sequence[ToyConfig], measure: Measure, *, jobs: int, points: int, label: str
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order: dist, objective, lr, seed, diverged and `figures`.

    The progress bar moves within trainings, too.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each.
        points: samples that figures are measured on.
        label: what the progress bar is called.
    """
    with _workers(jobs) as (pool, done), tqdm(total=len(configs), unit="run", desc=label) as bar:
        results = pool.imap(partial(_train, measure=measure, points=points), configs)
        for _ in configs:
            result = None
            while result is None:
                with contextlib.suppress(multiprocessing.TimeoutError):
                    result = results.next(POLL)
                bar.n = round(done.value, 1)
                bar.refresh()
            yield result
