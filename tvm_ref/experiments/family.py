"""Measure every objective of the family at the exact flow map and at a trained network, and draw the family.

    python -m tvm_ref.experiments.family                             all of it, some five minutes of one idle core
    python -m tvm_ref.experiments.family --parts picture noise cost  chosen parts

    picture   the (t, s) that each method trains, and what it matches there: family.png
    noise     ||dL/dF||^2 of every objective at the exact flow map, of its jumps and in total, relative to flow matching
    cost      matmuls of a training step, in units of a plain forward
    bias      how far the adaptive weight of MeanFlow moves its minimiser, by dimension
    gradients at the default run's network, early and late, by t - s: the batch at which a gradient's noise equals its
              signal, and the cosine between it and the gradient of the true error
Writes results.json and, with `picture`, family.png, with `gradients`, cosines.png into a folder of its own; parts that
are measured with other options go into another folder.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.experiments import family_measures
from tvm_ref.flow_map import FlowMap
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.training import Training

PARTS = ("picture", "noise", "cost", "bias", "gradients")
STAGES = (0.1, 0.3, 1.0)  # fractions of a training at which gradients are measured
COORDINATES = {"masses 0.8 and 0.2": 0.8, "masses 0.5 and 0.5": 0.5}  # probability of one of a coordinate's values
DIMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
GAPS = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)


def trained(config: ToyConfig) -> dict[int, FlowMap]:
    """Train a network and return its evaluation weights at STAGES, by step."""
    training, kept = Training(config, config.make_distribution()), {}
    for step in progress(range(1, config.steps + 1), unit="step", desc="training"):
        training.train_step()
        if step in [math.ceil(stage * config.steps) for stage in STAGES]:
            kept[step] = copy.deepcopy(training.ema.module)
    return kept


def measure(
    parts: list[str], config: ToyConfig, distribution: GaussianMixture, samples: int, dims: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    """Measure the chosen parts; print each, and yield its key in results.json and its numbers."""
    if "noise" in parts:
        noise = family_measures.noise_at_the_solution(distribution, samples)
        print(noise_table(noise))
        yield "noise", noise
    if "cost" in parts:
        products = family_measures.cost(config.width, config.depth)
        print(column("products of a step, in plain forwards", products, ".1f"))
        yield "cost", products
    if "bias" in parts:
        bias = {
            name: {str(dim): family_measures.adaptive_bias(dim, mass, max(8, min(64, 4096 // dim))) for dim in dims}
            for name, mass in COORDINATES.items()
        }
        for name, values in bias.items():
            print(column(f"bias of the adaptive weight by dimension, {name}", values, ".4f"))
        yield "adaptive_bias", bias
    if "gradients" in parts:
        stages = trained(config)
        measured: dict[str, Any] = {"gaps": list(GAPS), "steps": {}}
        for step, model in progress(stages.items(), unit="stage", desc="gradients"):
            found = family_measures.gradients_of_jumps(model, distribution, GAPS, size=max(2, samples // 2))
            measured["steps"][str(step)] = {name: [g._asdict() for g in row] for name, row in found.items()}
        print(gradient_table(measured))
        yield "gradients", measured


def column(title: str, values: dict[str, float], form: str) -> str:
    """Format one number per name."""
    return "\n".join([title, *(f"  {name:<32} {value:>10{form}}" for name, value in values.items())])


def noise_table(noise: dict[str, dict[str, float]]) -> str:
    """Format the noise at the solution."""
    lines = [f"{'noise at the solution, over flow matching':<44} {'mean':>9} {'error':>9} {'median':>9} {'whole':>9}"]
    lines += [f"  {name:<42} " + " ".join(f"{value:>9.2g}" for value in row.values()) for name, row in noise.items()]
    return "\n".join(lines)


def gradient_table(measured: dict[str, Any]) -> str:
    """Format the cosine at the first stage, where most are resolved, and the noise scale at the last, by t - s."""
    lines, (first, *_, last) = [], measured["steps"]
    for step, title, quantity, form in (
        (first, "cosine with the true gradient", "cosine", ".2f"),
        (last, "batch where noise = signal", "noise_scale", ".3g"),
    ):
        lines.append(f"{f'{title}, step {step}':<38}" + " ".join(f"{gap:>8}" for gap in measured["gaps"]))
        for name, row in measured["steps"][step].items():
            values = [gradients[quantity] for gradients in row]
            lines.append(f"{name:<38}" + " ".join(f"{'none' if v is None else f'{v:{form}}':>8}" for v in values))
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.experiments.family", __doc__)
    add_options(p, ToyConfig, ["dist", "data", "bandwidth", "steps", "batch_size", "width", "depth", "seed"])
    p.add_argument(
        "--parts", nargs="+", choices=tuple(PARTS), default=tuple(PARTS), help="what to measure (default: all)"
    )
    p.add_argument(
        "--samples", type=int, default=500,
        help="samples at the exact flow map; 16 times as many for gradients",
    )  # fmt: skip
    p.add_argument("--dims", type=int, nargs="+", default=DIMS, help="dimensions D for the part bias")
    p.add_argument("--out", type=Path, help="folder to write (default: runs/toy/NAME-family-PARTS)")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        config = ToyConfig(**given(arguments, ToyConfig))
        distribution = config.make_distribution()
        require_at_least(2, samples=arguments.samples)
        require_at_least(1, dims=min(arguments.dims))
        parts = [] if {*arguments.parts} == {*PARTS} else arguments.parts
        out = arguments.out or Path("runs/toy") / "-".join([config.name, "family", *parts])
        require_free(out, ["results.json"], "measurements")
        out.mkdir(parents=True, exist_ok=True)
    options = {"samples": arguments.samples, "dims": list(arguments.dims)}
    report: dict[str, Any] = {"dist": config.name, "made_with": asdict(config), "options": options}
    with command.errors(f"{out} holds the parts that were printed"):
        for key, numbers in measure(arguments.parts, config, distribution, arguments.samples, tuple(arguments.dims)):
            report[key] = numbers
            write_atomically(out / "results.json", json.dumps(report, indent=2) + "\n")
        from tvm_ref.experiments import family_plots  # slow to import: not for --help
        from tvm_ref.toy.report.plots import save_figure

        if "picture" in arguments.parts:
            save_figure(family_plots.plot_family(), out / "family.png")
        if "gradients" in arguments.parts:
            save_figure(family_plots.plot_cosines(report["gradients"]), out / "cosines.png")
    print(out)
    return 0


if __name__ == "__main__":
    run(main)
