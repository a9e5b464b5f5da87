"""Repeat the paper's figure 4 on small DiTs: test whether the usual norms make them diverge under TVM.

    python imagenet/norms.py                                                  the measurements of the documentation
    python imagenet/norms.py --cases 64:0.02 256:0.02:bfloat16 --steps 1000   width:rate[:precision], longer

Trains small DiTs on the digits (AdamW, constant rate, no clipping) from the same weights, on the same batches:

    pytorch         PyTorch's LayerNorm, whose gradient through a JVP is wrong; no QK norm, plain modulation
    exact           the same network, with a LayerNorm whose gradient is right
    semi-lipschitz  RMSNorm instead, also for queries, keys and modulation vectors (the paper's network)

Recorded every ten steps are the means of both loss terms and the maxima of the gradient's norm and of the root mean
square of the embedding of t - s. A training ends where a loss or a gradient is not finite (`broken_at` in the JSON).
The file is written after each training; with a file that exists the command adds the trainings that it lacks.
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
from imagenet.model.distributed import World
from imagenet.model.dit import EPS
from imagenet.training.step import Training
from tvm_ref.cli.errors import require, user_files
from tvm_ref.cli.files import read_json, require_suffix, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

VARIANTS = ("pytorch", "exact", "semi-lipschitz")
CURVES = ("jump", "flow_matching", "gradient_norm", "embedding")
CASES = ("64:0.02", "64:0.04", "64:0.08", "128:0.02", "128:0.04", "128:0.08")
EVERY = 10  # steps per recorded point
BASE = Config(patch_size=2, heads=4, optimizer="adamw", warmup=0, schedule="constant", clip=0.0)


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("norms.py", __doc__)
    case = "width, learning rate, perhaps bfloat16 (default: CASES)"
    p.add_argument("--cases", nargs="+", type=read_case, default=list(map(read_case, CASES)), help=case)
    p.add_argument("--seeds", type=int, default=3, help="number of seeds")
    p.add_argument("--steps", type=int, default=100, help="number of steps of each training")
    p.add_argument("--batch-size", type=int, default=32, help="number of images per step")
    p.add_argument("--depth", type=int, default=3, help="number of blocks")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/norms.json"), help="JSON file, next to its figure")
    return p


def read_case(case: str) -> tuple[int, float, str]:
    """Read a case as 64:0.02, in float32, or 64:0.02:bfloat16."""
    width, rate, precision = (case if case.count(":") > 1 else f"{case}:float32").split(":")
    return int(width), float(rate), precision


def case_name(config: Config) -> str:
    """Write the case of a configuration as read_case reads it."""
    return f"{config.hidden_size}:{config.lr:g}" + f":{config.precision}" * (config.precision != "float32")


def read_results(path: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    """Read the trainings of a file that an earlier command wrote, with the same sizes."""
    stored = read_json(path, "measurement of norms", ("runs",))
    same = all(stored.get(name) == size for name, size in sizes.items())
    require(same, f"{path} holds trainings with other sizes: choose another --out")
    runs: list[dict[str, Any]] = stored["runs"]
    return runs


def pytorch_layer_norm(x: Tensor) -> Tensor:
    """Apply PyTorch's own operator: the mode of jvp_ready sees F.layer_norm, not this."""
    normalised: Tensor = torch.ops.aten.native_layer_norm(x, x.shape[-1:], None, None, EPS)[0]
    return normalised


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
    """Draw two rows per width, gradient norm and embedding, a column per rate, a line per variant and seed."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    from tvm_ref.toy.report.plots import BLUE, ORANGE, RED, save_figure

    cases = {one["case"]: one["case"].split(":", 2) for one in results}
    rates = sorted({rate for _, rate, *_ in cases.values()}, key=float)
    networks = list(dict.fromkeys((width, *precision) for width, _, *precision in cases.values()))
    rows = [(network, name) for network in networks for name in ("gradient_norm", "embedding")]
    styles: dict[str, Any] = dict(
        zip(VARIANTS, ({"color": RED}, {"color": ORANGE, "ls": "--"}, {"color": BLUE}), strict=True)
    )
    figure = Figure(figsize=(4 * len(rates) + 1, 2.6 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(rates), sharex=True, sharey="row", squeeze=False)
    for one in results:
        width, rate, *precision = cases[one["case"]]
        for (network, name), ax in zip(rows, axes[:, rates.index(rate)], strict=True):
            if network == (width, *precision):
                steps = range(EVERY, EVERY * len(one[name]) + 1, EVERY)
                ax.semilogy(steps, one[name], **styles[one["variant"]])
    for ax, (network, name) in zip(axes[:, 0], rows, strict=True):
        ax.set_ylabel(f"{name.replace('_', ' ')}, width {' '.join(network)}")
    for column, rate in zip(axes.T, rates, strict=True):
        column[0].set_title(f"rate {rate}")
        column[-1].set_xlabel("step")
    axes[0, -1].legend(handles=[Line2D([], [], label=variant, **style) for variant, style in styles.items()])
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors():
        require_at_least(1, seeds=options.seeds)
        require_suffix(options.out, ".json")
        sizes = {name: getattr(options, name) for name in ("steps", "batch_size", "depth")}
        configs = [replace(BASE, **sizes, hidden_size=w, lr=rate, precision=p) for w, rate, p in options.cases]
        trainings = [(replace(c, seed=k), v) for c in configs for k in range(options.seeds) for v in VARIANTS]
        results = read_results(options.out, sizes) if options.out.exists() else []
        done = [{key: one[key] for key in ("case", "variant", "seed")} for one in results]
        for config, variant in progress(trainings, "trainings", unit="run"):
            name = {"case": case_name(config), "variant": variant, "seed": config.seed}
            if name in done:
                continue
            results.append(name | follow(make_training(config, variant), Batches(config, load_data(config))))
            with user_files():
                write_atomically(options.out, json.dumps(sizes | {"every": EVERY, "runs": results}) + "\n")
        with user_files():
            draw(results, options.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    run(main)
