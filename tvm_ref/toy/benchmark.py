"""How fast training is: time per step beside a flow-matching step, and time to a quality.

    python -m tvm_ref.toy.benchmark

First the step times of every objective, taken in turns, as ratios to flow matching on the same network: as they are,
and of the loss and its gradients alone, without optimizer and data. Then trainings of growing length, until the median
over seeds reaches the quality that the default is held to on moons.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tvm_ref.command_line import write_atomically
from tvm_ref.toy.compare import METHODS
from tvm_ref.toy.config import OneLineParser, ToyConfig, add_options, require_at_least
from tvm_ref.toy.run import distribution_of
from tvm_ref.toy.seeds import one_step
from tvm_ref.toy.sweep import train_many
from tvm_ref.toy.training import Batch, Training

QUALITY = {"paired_rmse": 0.07, "w2_same_noise": 0.06, "low_density": 0.04}  # one step, moons, median over seeds
BUDGETS = (500, 1000, 2000, 3000, 4000)  # training steps


def gradients(training: Training, batch: Batch) -> None:
    """Loss and gradients of one batch."""
    terms = training.objective(batch.x0, batch.x1, batch.times, batch.condition, training.target.module)
    terms.total.mean().backward()


def step_times(trainings: dict[str, Training], rounds: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds per whole step and per loss with gradients: medians over rounds, in each of which all take turns."""
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
    """Step times and their ratios to flow matching."""
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
    """Medians over seeds for each budget of steps, up to the first that reaches QUALITY; printed as they come."""
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


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = OneLineParser(
        "python -m tvm_ref.toy.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(p, ["batch_size", "width", "depth"])
    p.add_argument("--rounds", type=int, default=10, help="rounds of timing (default: 10)")
    p.add_argument("--repeats", type=int, default=20, help="steps per method and round (default: 20)")
    p.add_argument("--threads", type=int, default=2, help="threads (default: 2, as in training)")
    p.add_argument("--seeds", type=int, default=3, help="seeds of the time to quality; 0 leaves it out (default: 3)")
    p.add_argument("--jobs", type=int, default=2, help="trainings at a time for the time to quality (default: 2)")
    p.add_argument("--out", type=Path, help="also write the figures to this JSON file")
    given = vars(p.parse_args(argv))
    rounds, repeats, threads, seeds, jobs, out = (
        given.pop(k) for k in ("rounds", "repeats", "threads", "seeds", "jobs", "out")
    )
    try:
        base = ToyConfig(**given)
        require_at_least(1, rounds=rounds, repeats=repeats, threads=threads, jobs=jobs)
        require_at_least(0, seeds=seeds)
        if out and out.exists():
            raise ValueError(f"{out} exists already; choose another --out")
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        p.error(str(error))
    torch.set_num_threads(threads)
    distribution = distribution_of(base)
    trainings = {name: Training(replace(base, **changes), distribution) for name, changes in METHODS.items()}
    times = step_times(trainings, rounds, repeats)
    print(f"batch size {base.batch_size}, width {base.width}, depth {base.depth}, {threads} threads\n{table(times)}")
    report: dict[str, Any] = {"threads": threads, "milliseconds": times}
    if seeds:
        print(f"\ntime to quality on {base.dist} (one step, median over {seeds} seeds)")
        try:
            report["quality"] = time_to_quality(base, times["TVM"]["step"], seeds=seeds, jobs=jobs, points=2000)
        except KeyboardInterrupt:
            print("\nstopped")
            return 130
    if out:
        write_atomically(out, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
