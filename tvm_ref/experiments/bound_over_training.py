"""Measure the bound over training, to see whether lowering the loss lowers W2.

    python -m tvm_ref.experiments.bound_over_training --dist moons

Trains while measuring, which takes a few minutes. Writes training.json (after every measurement) and training.png, the
chain over training. The exit status is 1 if a link of the chain is violated, which the theory excludes.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ref.bound.chain import TERMS, measure
from tvm_ref.bound.measuring import WHILE_TRAINING, Measuring, require_covered, to_json
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, run
from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.training import Training

TRAINING_OPTIONS = ["dist", "data", "bandwidth", "objective", "steps", "batch_size", "width", "depth", "lr",
                    "time_sampler", "noise_share", "equal_share", "target_ema", "ema", "seed"]  # fmt: skip
MEASUREMENTS = 24  # over training, equally spaced in the logarithm of the step
LOSSES = ("training_loss", "loss")
Record = dict[str, Any]


def measured_steps(steps: int, measurements: int = MEASUREMENTS) -> list[int]:
    """Choose the training steps after which to measure: rising, the last one included."""
    first = min(20, steps)
    return sorted({round(a) for a in np.geomspace(first, steps, measurements)})


def measure_over_training(config: ToyConfig, measuring: Measuring) -> Iterator[Record]:
    """Train, and yield the chain of the evaluation weights at each of measured_steps, on the same draws every time.

    A record holds the step, the terms of the chain, their quadrature error, violated links, int L, `training_loss` (the
    mean of the objective since the record before, with its EMA target) and `loss` (eq. 9, EMA-free, mean over s).

    Raises:
        FloatingPointError: training that diverges.
    """
    distribution = config.make_distribution()
    draws, s = measuring.draw(distribution), measuring.times(distribution)
    training, losses = Training(config, distribution), []
    stops = set(measured_steps(config.steps))
    with progress(total=config.steps, unit="step", desc="training and measuring") as bar:
        while training.step < config.steps:
            losses.append(float(training.train_step().sum()))
            bar.update()
            if training.step not in stops:
                continue
            bound = measure(training.ema.module, distribution, draws, s, distribution.time_scale)
            bar.set_postfix(W2=f"{bound.values['w2']:.3f}", one_sided=f"{bound.values['pathwise_one_sided']:.3g}")
            yield {
                "step": training.step,
                "training_loss": sum(losses) / len(losses) * distribution.dim,
                "loss": bound.loss,
                "loss_minimum": bound.loss_minimum,
                **bound.values,
                "quadrature_error": bound.quadrature_error,
                "path_lipschitz": bound.path_length,
                "violations": bound.violations(),
            }
            losses.clear()


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


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.bound_over_training", __doc__)
    add_options(p, Measuring)
    add_options(p, ToyConfig, TRAINING_OPTIONS)
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-bound)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already in that folder")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a violated link."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        measuring = Measuring(**WHILE_TRAINING | given(arguments, Measuring))
        config = ToyConfig(**given(arguments, ToyConfig))
        require_covered(config)
        out = arguments.out or Path("runs/toy") / f"{config.name}-bound"
        require_free(out, ("training.json",), "such results", "--overwrite", overwrite=arguments.overwrite)
        config.make_distribution()  # refuses points that cannot be used
        out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"t": measuring.time, "points": measuring.points, "grid": measuring.grid, "records": []}
    records = report["records"]
    with command.errors():
        for record in measure_over_training(config, measuring):
            records.append(record)
            write_atomically(out / "training.json", to_json(report))
        correlations = rank_correlations(records)
        known = {name: None if math.isnan(value) else value for name, value in correlations.items()}
        write_atomically(out / "training.json", to_json(report | {"rank_correlation_with_w2": known}))
        from tvm_ref.bound.plots import plot_training  # matplotlib, which --help need not wait for
        from tvm_ref.toy.report.plots import save_figure

        save_figure(plot_training(records, correlations, config.name), out / "training.png")
    print(table(records, correlations))
    print(f"training.json and training.png: {out}")
    violated = [f"step {r['step']}: {link}" for r in records for link in r["violations"]]
    for link in violated:
        print(f"{command.prog}: violated: {link}", file=sys.stderr)
    return 1 if violated else 0


if __name__ == "__main__":
    run(main)
