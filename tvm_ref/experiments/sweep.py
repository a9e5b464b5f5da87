"""Train many models side by side, one thread each, for compare and seeds."""

import contextlib
import hashlib
import json
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import Reference, make_reference
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(ToyConfig(dist=dist, data=data, bandwidth=bandwidth).make_distribution(), points=points)


def train_and_measure(config: ToyConfig, measure: Measure, points: int, keep: Path | None = None) -> dict[str, Any]:
    """Train one configuration; return dist, objective, lr, seed, diverged and, if it did not, its metrics.

    The result is kept in the folder `keep`, under a name that the configuration decides, and read from there.
    """
    if keep is None:
        return _trained(config, measure, points)
    decides = json.dumps([asdict(config), points], default=dict, sort_keys=True)
    path = keep / f"{config.objective}-{hashlib.sha256(decides.encode()).hexdigest()[:16]}.json"
    if not path.exists():
        write_atomically(path, json.dumps(_trained(config, measure, points)))
    result: dict[str, Any] = json.loads(path.read_text())
    return result


def _trained(config: ToyConfig, measure: Measure, points: int) -> dict[str, Any]:
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
def _in_processes(
    train: Callable[[ToyConfig], dict[str, Any]], configs: Sequence[ToyConfig], jobs: int
) -> Iterator[Iterator[dict[str, Any]]]:
    """Train in processes, which this one ends in the end, whatever they are at; Ctrl-C does not reach them."""
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), use_one_thread)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by what starts now
    try:
        results = pool.map(train, configs)
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
    label: str,
    keep: Path | None = None,
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order; see train_and_measure.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each; 1 is this one.
        points: samples that errors are measured on.
        label: name of the progress bar, which moves by one for each training.
        keep: folder of earlier results, which are not trained again, and of new ones.
    """
    train = partial(train_and_measure, measure=measure, points=points, keep=keep)
    if jobs == 1:
        use_one_thread()
        yield from progress(map(train, configs), total=len(configs), unit="run", desc=label)
        return
    with _in_processes(train, configs, jobs) as results:
        yield from progress(results, total=len(configs), unit="run", desc=label)
