"""Measure the default over several seeds: median and worst one-step metrics, and how many runs diverged.

python -m tvm_ref.experiments.seeds                          all distributions, 5 seeds
python -m tvm_ref.experiments.seeds --dist moons --seeds 20
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments.sweep import train_many
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import DISTRIBUTIONS
from tvm_ref.toy.report.metrics import POINTS, Reference, evaluate
from tvm_ref.toy.training import Training

COLUMNS = ("paired_rmse", "paired_median", "w2_same_noise", "low_density")


def one_step(training: Training, reference: Reference) -> dict[str, float]:
    """Measure what metrics.json holds for one function evaluation."""
    return evaluate(training.evaluated, reference, 1)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Format median and worst over seeds of the metrics of each distribution."""
    lines = [
        f"{'median (worst)':<16} {'paired RMSE':^15} {'median':^15} {'W2 same noise':^15} {'low density':^17} diverged"
    ]
    for dist in dict.fromkeys(result["dist"] for result in results):
        runs = [result for result in results if result["dist"] == dist]
        cells = []
        for column in COLUMNS:
            values = [result["figures"].get(column, float("inf")) for result in runs]
            median, worst = statistics.median(values), max(values)
            percent = column == "low_density"
            cells.append(f"{100 * median:.1f} % ({100 * worst:.1f} %)" if percent else f"{median:.3f} ({worst:.3f})")
        diverged = sum(result["diverged"] for result in runs)
        lines.append(f"{dist:<16} " + " ".join(f"{c:^15}" for c in cells) + f"  {diverged} of {len(runs)}")
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.seeds", __doc__)
    p.add_argument(
        "--dist", nargs="+", choices=tuple(DISTRIBUTIONS), default=tuple(DISTRIBUTIONS),
        help="distributions (default: all)",
    )  # fmt: skip
    add_options(p, ToyConfig, ["steps", "batch_size", "width", "depth", "lr", "time_sampler", "noise_share"])
    p.add_argument("--seeds", type=int, default=5, help="number of seeds per distribution")
    p.add_argument("--jobs", type=int, default=2, help="number of runs at a time, one thread each")
    p.add_argument("--points", type=int, default=POINTS, help="number of samples to measure errors on")
    p.add_argument("--out", type=Path, help="also write every run's metrics to this JSON file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    with command.errors(), user_files():
        base = ToyConfig(**given(arguments, ToyConfig) | {"dist": arguments.dist[0]})
        require_at_least(1, seeds=arguments.seeds, jobs=arguments.jobs)
        require_at_least(10, points=arguments.points)
        require_new(arguments.out)
    configs = [replace(base, dist=dist, seed=seed) for dist in arguments.dist for seed in range(arguments.seeds)]
    results: list[dict[str, Any]] = []
    steps, out = sum(config.steps for config in configs), arguments.out
    kept = "nothing is kept without --out" if out is None else f"trainings that were finished, if any, are in {out}"
    print(f"{len(configs)} trainings; the bar estimates the time that is left from the first steps on")
    with command.errors(kept), progress(total=steps, unit="step", desc="training", smoothing=0) as bar:
        for result in train_many(configs, one_step, jobs=arguments.jobs, points=arguments.points, bar=bar):
            results.append(result)
            if out is not None:
                write_atomically(out, json.dumps(results, indent=2) + "\n")
    print(table(results))
    return 0


if __name__ == "__main__":
    run(main)
