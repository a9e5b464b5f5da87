"""How good the default is, over seeds: one-step figures of many runs, their median and worst, and how many diverged.

python -m tvm_ref.toy.seeds                          all distributions, 5 seeds
python -m tvm_ref.toy.seeds --dist moons --seeds 20
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.command_line import write_atomically
from tvm_ref.toy.config import OneLineParser, ToyConfig, add_options, require_at_least
from tvm_ref.toy.distributions import DISTRIBUTIONS
from tvm_ref.toy.metrics import Reference, evaluate
from tvm_ref.toy.sweep import train_many
from tvm_ref.toy.training import Training

COLUMNS = ("paired_rmse", "paired_median", "w2_same_noise", "low_density")


def one_step(training: Training, reference: Reference) -> dict[str, float]:
    """The figures of metrics.json for one function evaluation."""
    return evaluate(training.evaluated, reference, 1)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Median and worst over seeds of the figures of each distribution."""
    lines = [
        f"{'median (worst)':<16} {'paired RMSE':^15} {'median':^15} {'W2 same noise':^15} {'low density':^17} diverged"
    ]
    for dist in dict.fromkeys(result["dist"] for result in results):
        runs = [result for result in results if result["dist"] == dist]
        cells = []
        for column in COLUMNS:
            values = [run["figures"].get(column, float("inf")) for run in runs]
            median, worst = statistics.median(values), max(values)
            percent = column == "low_density"
            cells.append(f"{100 * median:.1f} % ({100 * worst:.1f} %)" if percent else f"{median:.3f} ({worst:.3f})")
        diverged = sum(run["diverged"] for run in runs)
        lines.append(f"{dist:<16} " + " ".join(f"{c:^15}" for c in cells) + f"  {diverged} of {len(runs)}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = OneLineParser(
        "python -m tvm_ref.toy.seeds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument(
        "--dist",
        nargs="+",
        choices=list(DISTRIBUTIONS),
        default=list(DISTRIBUTIONS),
        help="distributions (default: all)",
    )
    add_options(p, ["steps", "batch_size", "width", "depth", "lr", "time_sampler", "noise_share"])
    p.add_argument("--seeds", type=int, default=5, help="seeds per distribution (default: 5)")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    p.add_argument("--points", type=int, default=2000, help="samples that figures are measured on (default: 2000)")
    p.add_argument("--out", type=Path, help="also write every run's figures to this JSON file")
    given = vars(p.parse_args(argv))
    dists, seeds, jobs, points, out = (given.pop(k) for k in ("dist", "seeds", "jobs", "points", "out"))
    try:
        base = ToyConfig(**given)
        require_at_least(1, seeds=seeds, jobs=jobs)
        require_at_least(10, points=points)
        if out and out.exists():
            raise ValueError(f"{out} exists already; choose another --out")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    configs = [replace(base, dist=dist, seed=seed) for dist in dists for seed in range(seeds)]
    results = []
    status = 0
    try:
        for result in train_many(configs, one_step, jobs=jobs, points=points, label="training"):
            results.append(result)
            if out:
                write_atomically(out, json.dumps(results, indent=2) + "\n")
    except KeyboardInterrupt:
        print(f"\nstopped after {len(results)} of {len(configs)} runs")
        status = 130
    print(table(results))
    return status


if __name__ == "__main__":
    sys.exit(main())
