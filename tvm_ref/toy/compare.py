"""TVM beside flow matching, MeanFlow and PID on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.toy.compare --dist moons

Step times are measured side by side first; each method then gets the number of steps that fits in --seconds. Each
method has its own sweep of learning rates, on a seed of its own, judged at the NFE that it is for (1; 64 for flow
matching), and is then trained with its best rate on --seeds seeds.
Writes results.json, a table and error.png: error against the number of function evaluations (NFE).
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

from tvm_ref.command_line import write_atomically
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy import plots
from tvm_ref.toy.config import OneLineParser, ToyConfig, add_options, require_at_least
from tvm_ref.toy.metrics import Reference, paired_errors
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.sweep import train_many
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
SWEEP_SEED = 1000  # apart from the seeds that are reported
METHODS: dict[str, dict[str, Any]] = {
    "TVM": {},
    "TVM, JVP detached": {"detach_jvp": True},
    "PID": {"objective": "pid"},
    "MeanFlow": {"objective": "meanflow"},
    "flow matching": {"objective": "fm"},
}


def step_seconds(configs: dict[str, ToyConfig], rounds: int = 8, steps: int = 20) -> dict[str, float]:
    """Median seconds per training step of each configuration, taken in turns so that a noisy machine is fair to all."""
    trainings = {name: Training(config, distribution_of(config)) for name, config in configs.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainings}
    for _ in range(rounds):
        for name, training in trainings.items():
            begun = time.perf_counter()
            for _ in range(steps):
                training.train_step()
            seconds[name].append((time.perf_counter() - begun) / steps)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first round warms up


def errors(training: Training, reference: Reference) -> dict[str, float]:
    """Paired RMSE at every NFE."""
    return {str(n): float(paired_errors(training.evaluated, reference, n)[1].square().mean().sqrt()) for n in NFES}


def error(run: dict[str, Any], nfe: int) -> float:
    """A run's paired RMSE, infinite if it diverged."""
    return run["figures"].get(str(nfe), float("inf"))


def best_rate(results: Sequence[dict[str, Any]]) -> float:
    """The learning rate with the lowest error at the NFE that the method is for: 1, or 64 for flow matching."""
    return min(results, key=lambda run: error(run, 1 if OBJECTIVES[run["objective"]].learns_jumps else 64))["lr"]


def table(report: dict[str, Any]) -> str:
    """Median paired RMSE over seeds, and the range over seeds, per method and NFE."""
    columns = (1, 2, 4, 16, 64)
    lines = [f"{'method':<18} {'lr':>6} {'steps':>6}  " + " ".join(f"{f'NFE {n}':^21}" for n in columns)]
    for name, method in report["methods"].items():
        cells = []
        for n in columns:
            values = sorted(error(run, n) for run in method["runs"])
            cells.append(f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})")
        lines.append(f"{name:<18} {method['lr']:>6g} {method['steps']:>6}  " + " ".join(f"{c:^21}" for c in cells))
    return "\n".join(lines)


@matplotlib.rc_context(plots.STYLE)
def plot(report: dict[str, Any]) -> Figure:
    """Error against NFE: median and range over seeds."""
    figure, (ax,) = plots.make_figure(1, plane=False)
    figure.set_size_inches(8, 5)
    styles = zip("os^Dv", (plots.BLUE, plots.SKY, plots.PINK, plots.GREEN, plots.ORANGE), strict=True)
    for (name, method), (marker, colour) in zip(report["methods"].items(), styles, strict=True):
        values = [[error(run, n) for run in method["runs"]] for n in NFES]
        ax.plot(NFES, [statistics.median(v) for v in values], marker=marker, color=colour, label=name)
        ax.fill_between(NFES, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.15, lw=0)
    ax.set(xscale="log", yscale="log", xlabel="function evaluations (NFE)", ylabel="paired RMSE to the exact flow map")
    ax.set_xticks(NFES, [str(n) for n in NFES])
    ax.minorticks_off()
    ticks = [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    ax.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.grid(alpha=0.3)
    ax.set_title(f"{report['dist']}: {report['seconds']:g} s of training each, seeds: {report['seeds']}")
    ax.legend(fontsize=11)
    return figure


def compare(
    base: ToyConfig, *, rates: Sequence[float], seeds: int, seconds: float, jobs: int, points: int, out: Path
) -> dict[str, Any]:
    """Sweep, train and measure every method; results.json is rewritten after every run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    print("measuring step times")
    per_step = step_seconds({name: replace(base, **changes) for name, changes in METHODS.items()})
    torch.set_num_threads(threads)
    configs = {
        name: replace(base, steps=max(1, round(seconds / per_step[name])), **changes)
        for name, changes in METHODS.items()
    }
    report: dict[str, Any] = {
        "dist": base.name,
        "seconds": seconds,
        "seeds": seeds,
        "step_milliseconds": {name: round(1e3 * value, 3) for name, value in per_step.items()},
        "sweeps": {name: [] for name in configs},
        "methods": {},
    }

    def train(plan: list[tuple[list[dict[str, Any]], ToyConfig]], label: str) -> None:
        results = train_many([config for _, config in plan], errors, jobs=jobs, points=points, label=label)
        for (runs, _), result in zip(plan, results, strict=True):
            runs.append(result)
            write_atomically(out / "results.json", json.dumps(report, indent=2) + "\n")

    sweeps = report["sweeps"]
    train(
        [(sweeps[name], replace(c, lr=lr, seed=SWEEP_SEED)) for name, c in configs.items() for lr in rates],
        "sweeping learning rates",
    )
    for name, config in configs.items():
        report["methods"][name] = {"lr": best_rate(sweeps[name]), "steps": config.steps, "runs": []}
    train(
        [
            (report["methods"][name]["runs"], replace(c, lr=report["methods"][name]["lr"], seed=seed))
            for name, c in configs.items()
            for seed in range(seeds)
        ],
        "training",
    )
    return report


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = OneLineParser(
        "python -m tvm_ref.toy.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(p, ["dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler", "noise_share"])
    p.add_argument(
        "--seconds", type=float, default=30, help="training time of each run, in seconds of one thread (default: 30)"
    )
    p.add_argument("--seeds", type=int, default=3, help="seeds per method (default: 3)")
    p.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 3e-3, 1e-2, 3e-2],
        help="learning rates to sweep (default: 0.001 0.003 0.01 0.03)",
    )
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: 2)")
    p.add_argument("--points", type=int, default=2000, help="samples that errors are measured on (default: 2000)")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    given = vars(p.parse_args(argv))
    own = {k: given.pop(k) for k in ("seconds", "seeds", "rates", "jobs", "points", "out", "overwrite")}
    try:
        base = ToyConfig(**given)
        distribution_of(base)
        require_at_least(0.1, seconds=own["seconds"])
        if own["seconds"] == float("inf"):
            raise ValueError("--seconds must be finite")
        require_at_least(1, seeds=own["seeds"], jobs=own["jobs"])
        require_at_least(10, points=own["points"])
        if not all(0 < rate < float("inf") for rate in own["rates"]):
            raise ValueError("--rates must be positive and finite")
        out = own["out"] or Path("runs/toy") / f"{base.name}-compare"
        if (out / "results.json").exists() and not own["overwrite"]:
            raise ValueError(f"{out} already holds results: --overwrite, or another --out")
        out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    try:
        report = compare(base, out=out, **{k: own[k] for k in ("rates", "seeds", "seconds", "jobs", "points")})
    except KeyboardInterrupt:
        print(f"\nstopped; runs that were finished are in {out}")
        return 130
    plots.save_figure(plot(report), out / "error.png")
    print(f"paired RMSE to the exact flow map: median over {own['seeds']} seeds (range)\n{table(report)}\n{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
