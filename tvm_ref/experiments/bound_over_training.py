"""Measure W2 and its bounds over training, to see who has a guarantee.

    python -m tvm_ref.experiments.bound_over_training --dist moons checkerboard

Trains while measuring, which takes a few minutes per distribution. Measures the chain of theorem 1, the Eulerian and
Lagrangian bounds, MeanFlow's loss as a bound (tvm_ref/bound/other_bounds.py), and int L of the exact field, over the
points that the chain visits and over a square. Writes training.json (after every measurement) and
training.png. The exit status is 1 if a link of the chain is violated, which the theory excludes.
"""

import copy
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tvm_ref.bound import other_bounds
from tvm_ref.bound.chain import measure
from tvm_ref.bound.measuring import WHILE_TRAINING, Measuring, require_covered
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, run
from tvm_ref.cli.progress import progress
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.distributions import DISTRIBUTIONS
from tvm_ref.toy.training import Training

TRAINING_OPTIONS = ["objective", "steps", "batch_size", "width", "depth", "lr", "time_sampler", "noise_share",
                    "equal_share", "target_ema", "ema", "seed"]  # fmt: skip
MEASUREMENTS = 24  # over training, equally spaced in the logarithm of the step
COLUMNS = {
    "loss": "loss", "terminal_velocity": "eq. 7", "eulerian": "Eulerian", "mean_flow": "MeanFlow",
    "mean_square": "mean-square", "pathwise_one_sided": "one-sided", "lagrangian": "Lagrangian", "global": "theorem 1",
    "path_lipschitz": "int L", "exact_lipschitz": "of u",
}  # fmt: skip
Record = dict[str, Any]


def measured_steps(steps: int, measurements: int = MEASUREMENTS) -> list[int]:
    """Choose the training steps after which to measure: rising, the last one included."""
    first = min(20, steps)
    return sorted({round(a) for a in np.geomspace(first, steps, measurements)})


def measure_over_training(config: ToyConfig, measuring: Measuring) -> Iterator[Record]:
    """Train, and yield all bounds of the evaluation weights at each of measured_steps, on the same draws every time.

    A record holds the step, the terms of the chain, their quadrature error, violated links, the other bounds, int L of
    the model and of the exact field over the same points, and `loss` (eq. 9, mean over s) beside its minimum.

    Raises:
        FloatingPointError: training that diverges.
    """
    distribution = config.make_distribution()
    draws, s = measuring.draw(distribution), measuring.times(distribution)
    training, stops = Training(config, distribution), measured_steps(config.steps)
    with progress(total=config.steps, unit="step", desc=f"{config.name}: training and measuring") as bar:
        while training.step < config.steps:
            training.train_step()
            bar.update()
            if training.step not in stops:
                continue
            model = training.ema.module
            bound = measure(model, distribution, draws, s, distribution.time_scale)
            others = other_bounds.measure(copy.deepcopy(model).double(), distribution, draws, bound.paths)
            bar.set_postfix(W2=f"{bound.values['w2']:.3f}", eq7=f"{bound.values['terminal_velocity']:.3g}")
            yield {
                "step": training.step,
                "loss": bound.loss,
                "loss_minimum": bound.loss_minimum,
                **bound.values,
                **others,
                "quadrature_error": bound.quadrature_error,
                "path_lipschitz": bound.lipschitz_integral,
                "violations": bound.violations(),
            }


def table(found: dict[str, Any]) -> str:
    """Format every third record of a distribution and the last, and int L over the 2D square."""
    records, plane = found["records"], found["plane"]
    lines = [f"{'step':>8}{'W2':>9}" + "".join(f"{title:>12}" for title in COLUMNS.values())]
    for r in records[::-3][::-1]:
        lines.append(f"{r['step']:>8}{r['w2']:>9.3f}" + "".join(f"{r[name]:>12.4g}" for name in COLUMNS))
    lines += [
        f"int L looks at {found['looked_at']:,} points at each time, theorem 1 depends on them: an estimate from below",
        f"int L of u over {plane['points']:,} points of the plane: {plane['length']:.1f}, so theorem 1 multiplies RMS "
        f"residuals by up to sqrt(lambda) = {plane['factor']:.1e}",
    ]
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.bound_over_training", __doc__)
    p.add_argument("--dist", nargs="+", choices=tuple(DISTRIBUTIONS), default=["moons"], help="distributions")
    add_options(p, Measuring)
    add_options(p, ToyConfig, TRAINING_OPTIONS)
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAMES-bound)")
    p.add_argument("--overwrite", action="store_true", help="replace results that are already in that folder")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 a violated link."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        measuring = Measuring(**WHILE_TRAINING | given(arguments, Measuring))
        base = ToyConfig(**given(arguments, ToyConfig) | {"dist": arguments.dist[0]})
        require_covered(base)
        out = arguments.out or Path("runs/toy") / "-".join([*arguments.dist, "bound"])
        require_free(out, ("training.json",), "such results", "--overwrite", overwrite=arguments.overwrite)
        out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    with command.errors(f"what was measured is in {out / 'training.json'}"):
        for name in arguments.dist:
            config = replace(base, dist=name)
            found = report[name] = start(config, measuring)
            for record in measure_over_training(config, measuring):
                found["records"].append(record)
                write_atomically(out / "training.json", json.dumps(report, indent=1) + "\n")
            print(f"{name}\n{table(found)}")
        from tvm_ref.bound.plots import plot_training  # slow to import: not for --help
        from tvm_ref.toy.report.plots import save_figure

        save_figure(plot_training(report), out / "training.png")
    print(f"training.json and training.png: {out}")
    violated = [
        f"{name}, step {r['step']}: {v}" for name, f in report.items() for r in f["records"] for v in r["violations"]
    ]
    for line in violated:
        print(f"{command.prog}: violated: {line}", file=sys.stderr)
    return 1 if violated else 0


def start(config: ToyConfig, measuring: Measuring) -> dict[str, Any]:
    """Return the data of the measurement, and the slopes of the exact field over a 2D square."""
    distribution = config.make_distribution()
    length, points = other_bounds.slope_integral(distribution, measuring.times(distribution))
    factor = math.sqrt(2 * measuring.time) * math.exp(length)  # lambda(t) = 2 t exp(2 int L)
    return {
        "t": measuring.time,
        "grid": measuring.grid,
        "looked_at": 3 * measuring.points,  # X, Y and halfway between
        "plane": {"length": length, "points": points, "factor": factor},
        "records": [],
    }


if __name__ == "__main__":
    run(main)
