"""Train many models side by side, one thread each, for compare and seeds."""

import contextlib
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tvm_ref.cli.files import write_atomically
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.report.metrics import Reference, make_reference
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]
Tick = Callable[[int], Any]  # called with the number of steps taken
POLL = 0.5  # seconds between checks on the other processes
_steps: Any = None  # in a worker process: steps that all of them have taken


@lru_cache(maxsize=1)
def _distribution(dist: str, data: str | None, bandwidth: float | None) -> GaussianMixture:
    return ToyConfig(dist=dist, data=data, bandwidth=bandwidth).make_distribution()


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(_distribution(dist, data, bandwidth), points=points)


def _join(steps: Any) -> None:
    """Start a worker process: `steps` is shared by all."""
    global _steps
    _steps = steps
    use_one_thread()


def _count(steps: int) -> None:
    with _steps.get_lock():
        _steps.value += steps


def kept(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result that a file holds; compute and write it if the file is not there."""
    if not path.exists():
        write_atomically(path, json.dumps(compute()))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def file_of(keep: Path, name: str, *decides: Any) -> Path:
    """Return the path of a result in the folder `keep`: a name, and a hash of what decides the result."""
    text = json.dumps(decides, default=dict, sort_keys=True)
    return keep / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def _file(config: ToyConfig, points: int, keep: Path) -> Path:
    return file_of(keep, config.objective, asdict(config), points)


def train_and_measure(
    config: ToyConfig, measure: Measure, points: int, keep: Path | None = None, tick: Tick = _count
) -> dict[str, Any]:
    """Train one configuration; return dist, objective, lr, seed, diverged and, if it did not, its metrics.

    The result is kept in the folder `keep`, and read from there.
    """
    if keep is None:
        return _trained(config, measure, points, tick)
    return kept(_file(config, points, keep), lambda: _trained(config, measure, points, tick))


def _trained(config: ToyConfig, measure: Measure, points: int, tick: Tick) -> dict[str, Any]:
    data = (config.dist, config.data, config.bandwidth)
    training = Training(config, _distribution(*data))
    result = {"dist": config.dist, "objective": config.objective, "lr": config.lr, "seed": config.seed}
    try:
        while training.step < config.steps:
            training.train_step()
            tick(1)
    except FloatingPointError:
        tick(config.steps - training.step)
        return result | {"diverged": True, "figures": {}}
    return result | {"diverged": False, "figures": measure(training, _reference(*data, points))}


@contextlib.contextmanager
def _in_processes(
    train: Callable[[ToyConfig], dict[str, Any]], configs: Sequence[ToyConfig], jobs: int, steps: Any
) -> Iterator[list[Future[dict[str, Any]]]]:
    """Train in worker processes, which are always ended on exit; Ctrl-C does not reach them."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _join, (steps,))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what starts now
    try:
        results = [pool.submit(train, config) for config in configs]
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield results
    finally:
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        pool.shutdown()


def train_many(
    configs: Sequence[ToyConfig],
    measure: Measure,
    *,
    jobs: int,
    points: int,
    bar: tqdm,
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order; see train_and_measure.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each; 1 is this one.
        points: samples that errors are measured on.
        bar: moves by every step; those of earlier results leave its total.
        keep: folder of earlier results, which are not trained again, and of new ones.
    """
    bar.total -= sum(config.steps for config in configs if keep is not None and _file(config, points, keep).exists())
    train = partial(train_and_measure, measure=measure, points=points, keep=keep)
    if jobs == 1:
        use_one_thread()
        results: Iterator[dict[str, Any]] = (train(config, tick=bar.update) for config in configs)
    else:
        results = _from_processes(train, configs, jobs, bar)
    for done, result in enumerate(results, 1):
        bar.set_postfix_str(f"{done} of {len(configs)} trainings", refresh=False)
        yield result


def _from_processes(
    train: Callable[[ToyConfig], dict[str, Any]], configs: Sequence[ToyConfig], jobs: int, bar: tqdm
) -> Iterator[dict[str, Any]]:
    """Yield the results of processes, in order, and move the bar by their steps."""
    steps, counted = multiprocessing.get_context("spawn").Value("q", 0), 0
    with _in_processes(train, configs, jobs, steps) as results:
        for result in results:
            finished = False
            while not finished:
                finished, now = bool(wait([result], POLL).done), steps.value
                if bar.n == 0 < now:
                    bar.unpause()  # do not count the time of imports in the estimate
                bar.update(now - counted)
                counted = now
            yield result.result()
