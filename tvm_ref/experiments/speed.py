"""Measure how fast training is: time per step next to a flow-matching step, and time to a quality.

    python -m tvm_ref.experiments.speed
    python -m tvm_ref.experiments.speed --seeds 0            step times only

First the step times of every objective, taken in turns, as ratios to flow matching on the same network: as they are,
and of the loss and its gradients alone, without optimizer and data. Then trainings of growing length, until the median
over seeds reaches the quality that the default is held to on moons.
"""

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.experiments.methods import METHODS
from tvm_ref.experiments.seeds import one_step
from tvm_ref.experiments.sweep import train_many
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.report.metrics import POINTS
from tvm_ref.toy.training import Batch, Training

QUALITY = {"paired_rmse": 0.07, "w2_same_noise": 0.06, "low_density": 0.04}  # one step, moons, median over seeds
BUDGETS = (500, 1000, 2000, 3000, 4000)  # training steps


def gradients(training: Training, batch: Batch) -> None:
    """Compute loss and gradients of one batch."""
    terms = training.objective(batch.x0, batch.x1, batch.times, batch.condition, training.target.module)
    terms.total.mean().backward()


def step_times(trainings: dict[str, Training], rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Measure milliseconds per step, and per loss with gradients: medians over rounds, in which all take turns."""
    times: dict[str, dict[str, list[float]]] = {name: {"step": [], "gradients": []} for name in trainings}
    batches = {name: training.batch(training.step) for name, training in trainings.items()}
    for _ in range(rounds + 1):
        for name, training in trainings.items():
            for kind, call in (
                ("step", training.train_step),
                ("gradients", partial(gradients, training, batches[name])),
            ):
                begun = time.perf_counter()
                for _ in range(repeats):
                    call()
                times[name][kind].append(1e3 * (time.perf_counter() - begun) / repeats)
    # the first round warms up
    return {name: {kind: statistics.median(v[1:]) for kind, v in kinds.items()} for name, kinds in times.items()}


def table(times: dict[str, dict[str, float]]) -> str:
    """Format step times and their ratios to flow matching."""
    base = times["flow matching"]
    lines = [f"{'':<18} {'step':>9} {'ratio':>6} {'gradients':>10} {'ratio':>6}"]
    for name, t in times.items():
        lines.append(
            f"{name:<18} {t['step']:>6.2f} ms {t['step'] / base['step']:>6.2f} "
            f"{t['gradients']:>7.2f} ms {t['gradients'] / base['gradients']:>6.2f}"
        )
    return "\n".join(lines)


def time_to_quality(
    base: ToyConfig, milliseconds: float, *, seeds: int, jobs: int, points: int
) -> list[dict[str, Any]]:
    """Take medians over seeds for each budget of steps, up to the first that reaches QUALITY; print as they come."""
    rows = []
    for steps in BUDGETS:
        configs = [replace(base, steps=steps, seed=seed) for seed in range(seeds)]
        runs = list(train_many(configs, one_step, jobs=jobs, points=points, label=f"{steps} steps"))
        figures = {k: statistics.median(run["figures"].get(k, float("inf")) for run in runs) for k in QUALITY}
        reached = all(figures[k] <= limit for k, limit in QUALITY.items())
        rows.append({"steps": steps, "seconds": steps * milliseconds / 1e3, "reached": reached, **figures})
        print(
            f"{steps} steps, {rows[-1]['seconds']:.0f} s of training: paired RMSE {figures['paired_rmse']:.3f}, "
            f"W2 {figures['w2_same_noise']:.3f}, low density {100 * figures['low_density']:.1f} %"
            f"{' - reached' if reached else ''}"
        )
        if reached:
            break
    return rows


def measure(base: ToyConfig, rounds: int, repeats: int, seeds: int, jobs: int) -> dict[str, Any]:
    """Measure and print step times and, unless there are no seeds, the time to a quality; returns the figures."""
    distribution = base.make_distribution()
    trainings = {name: Training(replace(base, **changes), distribution) for name, changes in METHODS.items()}
    times = step_times(trainings, rounds, repeats)
    print(f"batch size {base.batch_size}, width {base.width}, depth {base.depth}, one thread\n{table(times)}")
    report: dict[str, Any] = {"milliseconds": times}
    if seeds:
        print(f"\ntime to quality on {base.dist} (one step, median over seeds), seeds: {seeds}")
        report["quality"] = time_to_quality(base, times["TVM"]["step"], seeds=seeds, jobs=jobs, points=POINTS)
    return report


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.speed", __doc__)
    add_options(p, ToyConfig, ["batch_size", "width", "depth"])
    p.add_argument("--rounds", type=int, default=10, help="rounds of timing")
    p.add_argument("--repeats", type=int, default=20, help="steps per method and round")
    p.add_argument("--seeds", type=int, default=3, help="seeds of the time to quality; 0 leaves it out")
    p.add_argument("--jobs", type=int, default=2, help="trainings at a time for the time to quality")
    p.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        base = ToyConfig(**given(arguments, ToyConfig))
        require_at_least(1, rounds=arguments.rounds, repeats=arguments.repeats, jobs=arguments.jobs)
        require_at_least(0, seeds=arguments.seeds)
        require_new(arguments.out)
    with command.errors():
        report = measure(base, arguments.rounds, arguments.repeats, arguments.seeds, arguments.jobs)
        if arguments.out is not None:
            write_atomically(arguments.out, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
