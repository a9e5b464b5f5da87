"""TVM beside flow matching, MeanFlow and PID on equal terms: one network, one optimizer, equal training time.

    python -m tvm_ref.toy.compare --dist moons

Step times are measured side by side first; each method then gets the number of steps that fits in --seconds. Each
method has its own sweep of learning rates, on a seed of its own, judged at the NFE that it is for (1; 64 for flow
matching), and is then trained with its best rate on --seeds seeds.
Writes results.json, a table and error.png: error against the number of function evaluations (NFE).
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tvm_ref.command_line import (
    OneLineParser,
    add_options,
    given,
    require_at_least,
    require_free,
    run,
    write_atomically,
)
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.metrics import POINTS, Reference, paired_errors
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.sweep import train_many
from tvm_ref.toy.training import Training

NFES = (1, 2, 4, 8, 16, 32, 64)
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler", "noise_share")
SWEEP_SEED = 1000  # apart from the seeds that are reported
METHODS: dict[str, dict[str, Any]] = {
    "TVM": {},
    "TVM, JVP detached": {"detach_jvp": True},
    "PID": {"objective": "pid"},
    "MeanFlow": {"objective": "meanflow"},
    "flow matching": {"objective": "fm"},
}


def step_seconds(configs: dict[str, ToyConfig], rounds: int = 8, steps: int = 20) -> dict[str, float]:
    """Measure median seconds per training step of each configuration, in turns: a noisy machine is then fair to all."""
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
    """Measure the paired RMSE at every NFE."""
    return {str(n): float(paired_errors(training.evaluated, reference, n)[1].square().mean().sqrt()) for n in NFES}


def error(result: dict[str, Any], nfe: int) -> float:
    """Look up a training's paired RMSE, infinite if it diverged."""
    return result["figures"].get(str(nfe), float("inf"))


def best_rate(results: Sequence[dict[str, Any]]) -> float:
    """Choose the learning rate with the lowest error at the NFE that the method is for: 1, or 64 for flow matching."""
    return min(results, key=lambda r: error(r, 1 if OBJECTIVES[r["objective"]].learns_jumps else 64))["lr"]


def table(report: dict[str, Any]) -> str:
    """Format the median paired RMSE over seeds, and the range, per method and NFE."""
    columns = (1, 2, 4, 16, 64)
    lines = [f"{'method':<18} {'lr':>6} {'steps':>6}  " + " ".join(f"{f'NFE {n}':^21}" for n in columns)]
    for name, method in report["methods"].items():
        cells = []
        for n in columns:
            values = sorted(error(result, n) for result in method["runs"])
            cells.append(f"{statistics.median(values):.3f} ({values[0]:.3f}-{values[-1]:.3f})")
        lines.append(f"{name:<18} {method['lr']:>6g} {method['steps']:>6}  " + " ".join(f"{c:^21}" for c in cells))
    return "\n".join(lines)


def compare(
    base: ToyConfig, *, rates: Sequence[float], seeds: int, seconds: float, jobs: int, points: int, out: Path
) -> dict[str, Any]:
    """Sweep, train and measure every method; results.json is rewritten after every training."""
    print("measuring step times")
    per_step = step_seconds({name: replace(base, **changes) for name, changes in METHODS.items()})
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


def draw(report: dict[str, Any], path: Path) -> None:
    """Draw error against NFE into a PNG file."""
    from tvm_ref.toy import plots  # matplotlib, which --help need not wait for

    values = {
        name: [[error(result, n) for result in method["runs"]] for n in NFES]
        for name, method in report["methods"].items()
    }
    title = f"{report['dist']}: {report['seconds']:g} s of training each, seeds: {report['seeds']}"
    plots.save_figure(plots.plot_errors(values, NFES, title), path)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.toy.compare", __doc__)
    add_options(p, ToyConfig, SHARED)
    p.add_argument("--seconds", type=float, default=30.0, help="training time of each run, in seconds of one thread")
    p.add_argument("--seeds", type=int, default=3, help="seeds per method")
    p.add_argument("--rates", type=float, nargs="+", default=[0.001, 0.003, 0.01, 0.03], help="learning rates to sweep")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    p.add_argument("--points", type=int, default=POINTS, help="samples that errors are measured on")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-compare)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already there")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.bad_input():
        base = ToyConfig(**given(arguments, ToyConfig))
        require_at_least(0.1, seconds=arguments.seconds)
        if arguments.seconds == float("inf"):
            raise ValueError("--seconds must be finite")
        require_at_least(1, seeds=arguments.seeds, jobs=arguments.jobs)
        require_at_least(10, points=arguments.points)
        if not all(0 < rate < float("inf") for rate in arguments.rates):
            raise ValueError("--rates must be positive and finite")
        out = arguments.out or Path("runs/toy") / f"{base.name}-compare"
        require_free(out, ("results.json",), "a comparison", "--overwrite", overwrite=arguments.overwrite)
        distribution_of(base)
        out.mkdir(parents=True, exist_ok=True)
    with command.failures(f"trainings that were finished are in {out}"):
        size = {name: getattr(arguments, name) for name in ("rates", "seeds", "seconds", "jobs", "points")}
        report = compare(base, out=out, **size)
        draw(report, out / "error.png")
    print(f"paired RMSE to the exact flow map, median over seeds (range), seeds: {arguments.seeds}")
    print(f"{table(report)}\n{out}")
    return 0


if __name__ == "__main__":
    run(main)
