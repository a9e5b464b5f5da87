"""Ask the paper's figure 4 in the small: is it the usual norms that make a DiT explode under TVM.

    python imagenet/norms.py                                                  the measurements of the documentation
    python imagenet/norms.py --cases 64:0.02 256:0.02 --steps 1000 --seeds 5  width:learning rate, longer

Trains small DiTs on the digits (AdamW, constant rate, no clipping) from the same weights, on the same batches:

    pytorch         LayerNorm as PyTorch has it, whose gradient through a JVP is wrong; no QK norm, plain modulation
    exact           the same network, with a LayerNorm whose gradient is right
    semi-lipschitz  RMSNorm in its place, also of queries, keys and modulation vectors (the paper's network)

Recorded every ten steps are the means of both loss terms and the maxima of the gradient's norm and of the root mean
square of the embedding of t - s. A training ends where a loss or a gradient is not finite (`broken_at` in the JSON).
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.config import Config
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.distributed import World
from imagenet.model.dit import EPS
from imagenet.training.step import Training
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_new, require_suffix, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

VARIANTS = ("pytorch", "exact", "semi-lipschitz")
CURVES = ("jump", "flow_matching", "gradient_norm", "embedding")
EVERY = 10  # steps per recorded point
BASE = Config(patch_size=2, heads=4, optimizer="adamw", warmup=0, schedule="constant", clip=0.0)


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("norms.py", __doc__)
    case = "width and learning rate (default: 64:0.02 64:0.08)"
    p.add_argument("--cases", nargs="+", type=width_and_rate, default=[(64, 0.02), (64, 0.08)], help=case)
    p.add_argument("--seeds", type=int, default=3, help="number of seeds")
    p.add_argument("--steps", type=int, default=80, help="steps of each training")
    p.add_argument("--batch-size", type=int, default=32, help="images per step")
    p.add_argument("--depth", type=int, default=3, help="number of blocks")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/norms.json"), help="file; its figure is beside it")
    return p


def width_and_rate(case: str) -> tuple[int, float]:
    """Read a case as 64:0.02."""
    width, rate = case.split(":")
    return int(width), float(rate)


def pytorch_layer_norm(x: Tensor) -> Tensor:
    """Apply PyTorch's own operator: jvp_ready, which answers F.layer_norm, does not know it."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0]


def make_training(config: Config, variant: str) -> Training:
    """Make a training with the norms of one of VARIANTS."""
    training = Training(replace(config, norms="all" if variant == "semi-lipschitz" else "none"), World())
    for model in (training.model, training.target.module, training.ema.module) if variant == "pytorch" else ():
        for layer in (*model.network.blocks, model.network.final_layer):  # type: ignore[misc]
            layer.norm = pytorch_layer_norm
    return training


def follow(training: Training, batches: Batches) -> dict[str, Any]:
    """Train to the end, or until a number is not finite; returns CURVES and the step where it broke, or None."""
    embed, rows = training.model.network.s_embedder, []
    for step in range(len(batches)):
        batch = batches[step]
        try:
            metrics = training.train_step(batch)
        except FloatingPointError:
            break
        size = embed(batch.times.t - batch.times.s).square().mean().sqrt().item()  # type: ignore[operator]
        rows.append([*metrics.losses, metrics.gradient_norm, size])
    n = len(rows) // EVERY
    points = torch.tensor(rows[: n * EVERY], dtype=torch.float64).reshape(n, EVERY, len(CURVES))
    columns = torch.cat([points[..., :2].mean(1), points[..., 2:].amax(1)], dim=1).T.tolist()
    curves = {name: [float(f"{a:.4g}") for a in column] for name, column in zip(CURVES, columns, strict=True)}
    return curves | {"broken_at": len(rows) if len(rows) < len(batches) else None}


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Draw a row per case, a column per curve, a line per variant and seed."""
    from matplotlib.figure import Figure

    from tvm_ref.toy.report.plots import BLUE, ORANGE, RED, save_figure

    cases = list(dict.fromkeys(one["case"] for one in results))
    styles = dict(zip(VARIANTS, ({"color": RED}, {"color": ORANGE, "ls": "--"}, {"color": BLUE}), strict=True))
    figure = Figure(figsize=(13, 3 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), len(CURVES), squeeze=False)
    for one in results:
        for ax, name in zip(axes[cases.index(one["case"])], CURVES, strict=True):
            steps = range(EVERY, EVERY * len(one[name]) + 1, EVERY)
            ax.semilogy(steps, one[name], label=one["variant"] if one["seed"] == 0 else None, **styles[one["variant"]])
            ax.set(title=name.replace("_", " "), xlabel="step (width {}, rate {})".format(*one["case"].split(":")))
    axes[0, 0].legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors():
        require_at_least(1, seeds=options.seeds)
        require_suffix(options.out, ".json")
        require_new(options.out)
        sizes = {name: getattr(options, name) for name in ("steps", "batch_size", "depth")}
        configs = [replace(BASE, **sizes, hidden_size=width, lr=rate) for width, rate in options.cases]
        trainings = [(replace(c, seed=k), v) for k in range(options.seeds) for c in configs for v in VARIANTS]
        results: list[dict[str, Any]] = []
        for config, variant in progress(trainings, "trainings", unit="run"):
            name = {"case": f"{config.hidden_size}:{config.lr:g}", "variant": variant, "seed": config.seed}
            results.append(name | follow(make_training(config, variant), Batches(config, load_data(config))))
        with user_files():
            write_atomically(options.out, json.dumps(sizes | {"every": EVERY, "runs": results}) + "\n")
            draw(results, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run(main)
