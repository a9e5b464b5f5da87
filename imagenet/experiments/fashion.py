"""Compare models of Fashion-MNIST: a table of their metrics, and a picture of what each draws from the same noise.

    torchrun imagenet/train.py fashion --data-path DATA
    torchrun imagenet/train.py fashion --data-path DATA --objective fm --out runs/imagenet/fashion-fm
    python -m imagenet.experiments.fashion runs/imagenet/fashion runs/imagenet/fashion-fm --data-path DATA

The table has controls: pictures that were held out, and the mean picture of each class, which is accurate and without
variety. Below the first row of samples lie the pictures to learn from that are nearest to them, pixel by pixel.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagenet.data.fashion import load_fashion
from imagenet.metrics.digits import class_means
from imagenet.metrics.fashion import FashionMetrics, fashion_metrics
from imagenet.metrics.own import measure_model
from imagenet.sampler import Generator, load_generator
from tvm_ref.cli.errors import require, user_files
from tvm_ref.cli.files import require_new
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress
from tvm_ref.objectives import OBJECTIVES

DRAWN = 20  # samples in a row, two of each class
HEADER = ("accuracy", "frechet", "precision", "recall")


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.experiments.fashion", __doc__)
    p.add_argument("sources", nargs="+", help="folders of runs, or .safetensors files")
    p.add_argument("--data-path", required=True, help="folder of Fashion-MNIST, fetched into it if missing")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16], help="numbers of network evaluations")
    p.add_argument("--out", type=Path, default=Path("fashion.png"), help="where to write the picture")
    return p


def nearest(samples: Tensor, x: Tensor) -> Tensor:
    """Return, for each sample [N, ...], the picture of x [M, ...] that is nearest by its pixels."""
    return x[torch.cdist(samples.flatten(1), x.flatten(1)).argmin(1)]


def row(name: str, metrics: dict[str, float]) -> str:
    """Format one line of the table."""
    return f"{name:<30}" + "".join(f"{metrics[key]:>11.3f}" for key in HEADER)


def draw(rows: dict[str, Tensor], path: Path) -> None:
    """Draw rows of pictures [DRAWN, 1, 28, 28] in [-1, 1], each with its name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(DRAWN * 0.4 + 1.6, len(rows) * 0.47), dpi=80, layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (name, x) in zip(axes, rows.items(), strict=True):
        axis.imshow(np.concatenate(list(x[:, 0].clamp(-1, 1)), axis=1), cmap="gray", vmin=-1, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        axis.spines[:].set_visible(False)
    figure.savefig(path)


def name_of(generator: Generator, source: str, names: dict[str, str]) -> str:
    """Return the objective of a model, or its path if several have that objective."""
    objective = generator.config.objective
    return objective if list(names.values()).count(objective) == 1 else source


def steps_of(generator: Generator, steps: list[int]) -> list[int]:
    """Return the numbers of steps that a model makes sense with."""
    return [1] if OBJECTIVES[generator.config.objective].one_step_only else steps


def compare(models: dict[str, Generator], steps: list[int], metrics: FashionMetrics) -> list[str]:
    """Measure models; returns lines of a table."""
    lines = []
    for name, generator in progress(models.items(), desc="measuring"):
        for nfe, found in measure_model(generator, steps_of(generator, steps), metrics).items():
            lines.append(row(f"{name}, NFE {nfe}", found))
    return lines


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    o = command.parse_args(argv)
    with command.errors(), user_files():
        require_at_least(1, steps=min(o.steps))
        require_new(o.out)
        generators = {source: load_generator(source) for source in o.sources}
        for source, generator in generators.items():
            require(generator.config.data == "fashion", f"{source} is a model of {generator.config.data}")
        (x, y), (test, labels) = ((x / 127.5 - 1, y) for x, y in load_fashion(o.data_path))
    objectives = {source: generator.config.objective for source, generator in generators.items()}
    models = {name_of(generator, source, objectives): generator for source, generator in generators.items()}
    metrics = fashion_metrics(o.data_path)
    print(f"the network that measures is right about {metrics.accuracy:.3f} of held-out pictures")
    print(f"{'':<30}" + "".join(f"{key:>11}" for key in HEADER))
    print(row("held-out pictures", metrics.measure(test[: len(metrics.labels)])))
    print(row("class means", metrics.measure(class_means(x, y, metrics.labels))))
    print("\n".join(compare(models, o.steps, metrics)))
    shown = {"held out": torch.stack([test[labels == k % 10][k // 10] for k in range(DRAWN)])}
    for name, generator in models.items():
        for nfe in steps_of(generator, o.steps):
            shown[f"{name}, NFE {nfe}"] = generator.samples(range(DRAWN), nfe)
            shown.setdefault("nearest to those", nearest(shown[f"{name}, NFE {nfe}"], x))
    draw(shown, o.out)
    print(f"wrote {o.out}")
    return 0


if __name__ == "__main__":
    run(main)
