"""Many trainings side by side, one thread each: what compare and seeds share."""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from tqdm import tqdm

from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.metrics import Reference, make_reference
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.training import Training

Measure = Callable[[Training, Reference], dict[str, float]]


@lru_cache(maxsize=1)
def _reference(dist: str, data: str | None, bandwidth: float | None, points: int) -> Reference:
    return make_reference(distribution_of(ToyConfig(dist=dist, data=data, bandwidth=bandwidth)), points=points)


def _train(config: ToyConfig, measure: Measure, points: int) -> dict[str, Any]:
    reference = _reference(config.dist, config.data, config.bandwidth, points)
    training = Training(config, reference.distribution)
    result = {"dist": config.dist, "objective": config.objective, "lr": config.lr, "seed": config.seed}
    try:
        while training.step < config.steps:
            training.train_step()
    except FloatingPointError:
        return result | {"diverged": True, "figures": {}}
    return result | {"diverged": False, "figures": measure(training, reference)}


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends the workers


def train_many(
    configs: Sequence[ToyConfig], measure: Measure, *, jobs: int, points: int, label: str
) -> Iterator[dict[str, Any]]:
    """Train each configuration and yield its result, in order: dist, objective, lr, seed, diverged and `figures`.

    Args:
        configs: what to train, without classes.
        measure: a function of the trained model and its reference, importable by name.
        jobs: processes at a time, one thread each.
        points: samples that figures are measured on.
        label: what the progress bar is called.
    """
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(jobs, _start_worker) as pool,
        tqdm(total=len(configs), unit="run", desc=label) as bar,
    ):
        for result in pool.imap(partial(_train, measure=measure, points=points), configs):
            bar.update()
            yield result
