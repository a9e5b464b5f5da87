"""Measure the bound over training, to see whether lowering the loss lowers W2."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch import Tensor

from tvm_ref.bound.chain import measure
from tvm_ref.bound.terms import TERMS
from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.training import Training

MEASUREMENTS = 24  # over training, equally spaced in the logarithm of the step
LOSSES = ("training_loss", "loss")
Record = dict[str, Any]


def measured_steps(steps: int, measurements: int = MEASUREMENTS) -> list[int]:
    """Choose the training steps after which to measure: rising, the last one included."""
    first = min(20, steps)
    return sorted({round(a) for a in np.geomspace(first, steps, measurements)})


def measure_over_training(
    config: ToyConfig, distribution: GaussianMixture, x0: Tensor, x1: Tensor, *, t: float, steps: int
) -> Iterator[Record]:
    """Train, and yield the chain of the evaluation weights at each of measured_steps, on the same draws every time.

    A record holds the step, the terms of the chain, their quadrature error, violated links, int L, `training_loss` (the
    mean of the objective since the record before, with its EMA target) and `loss` (eq. 9, EMA-free, mean over s).

    Raises:
        FloatingPointError: training that diverges.
    """
    training, total, count = Training(config, distribution), 0.0, 0
    scale = distribution.time_scale
    stops = set(measured_steps(config.steps))
    with progress(total=config.steps, unit="step", desc="training and measuring") as bar:
        while training.step < config.steps:
            total, count = total + float(training.train_step().sum()), count + 1
            bar.update()
            if training.step not in stops:
                continue
            bound = measure(training.ema.module, distribution, x0, x1, t=t, scale=scale, steps=steps)
            bar.set_postfix(W2=f"{bound.values['w2']:.3f}", one_sided=f"{bound.values['pathwise_one_sided']:.3g}")
            yield {
                "step": training.step,
                "training_loss": total / count * distribution.dim,
                "loss": bound.loss,
                "loss_minimum": bound.loss_minimum,
                **bound.values,
                "quadrature_error": bound.quadrature_error,
                "path_lipschitz": bound.path_length,
                "violations": bound.violations(),
            }
            total, count = 0.0, 0


def rank_correlations(records: list[Record]) -> dict[str, float]:
    """Correlate W2 with the losses and every other term over the records, by rank (Spearman); NaN for too few."""
    w2 = [record["w2"] for record in records]
    names = [*LOSSES, *(name for name in TERMS if name != "w2")]
    if len(records) < 3:
        return dict.fromkeys(names, math.nan)
    return {name: _spearman([record[name] for record in records], w2) for name in names}


def _spearman(a: list[float], b: list[float]) -> float:
    from scipy.stats import spearmanr  # half a second of CPU, which --help need not wait for

    return math.nan if len(set(a)) == 1 or len(set(b)) == 1 else float(spearmanr(a, b).statistic)


def table(records: list[Record], correlations: dict[str, float]) -> str:
    """Format every third record and the last, and the correlations under their columns."""
    columns = {
        "training_loss": "train. loss", "loss": "loss", "displacement": "displacement",
        "terminal_velocity": "eq. 7", "mean_square": "mean-square", "pathwise_one_sided": "one-sided",
        "pathwise_two_sided": "two-sided", "global": "global",
    }  # fmt: skip
    lines = [f"{'step':>8}{'W2':>9}" + "".join(f"{title:>13}" for title in columns.values())]
    shown = records[::-3][::-1]
    lines += [f"{r['step']:>8}{r['w2']:>9.3f}" + "".join(f"{r[name]:>13.4g}" for name in columns) for r in shown]
    lines.append(f"{'Spearman with W2':>17}" + "".join(f"{correlations[name]:>13.2f}" for name in columns))
    return "\n".join(lines)
