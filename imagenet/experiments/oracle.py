"""Train on images whose exact flow is known, and measure how far from it the models of several objectives are.

    python -m imagenet.experiments.oracle                                 all, some ten minutes of one core
    python -m imagenet.experiments.oracle --objectives tvm fm --seeds 1   some, a few minutes
    python -m imagenet.experiments.oracle --objectives tvm --w 2          of classes, guided
    python -m imagenet.experiments.oracle --seeds 0                       the adaptive weight, without training

The digits to learn from, each with a Gaussian around it, are a Gaussian mixture in 64 dimensions: its velocity, flow
map and density are known, as on the plane. The Gaussians are as wide as makes the held-out digits likeliest. Every
training step has new draws, so that only the mixture can be learned. The network is the toy's MLP, wider; each training
has the matrix products of --steps steps of TVM, without a sweep of rates.

Distances are those of whole images, in units in which the mean square of a pixel is 1; the mean image is 8 from others.
Printed are the paired RMSE to the exact flow's image of the same noise, by the number of steps (medians over seeds,
ranges), and of TVM's first seed W2 to fresh data, beside that of data to other data ("floor"), and the terms of the
Wasserstein bound. Without trainings it is how far the adaptive weight of MeanFlow moves the velocity at t = s, in
deviations of v given x_t, and with it the images of the flow. Writes results.json and oracle.png (noise, exact images,
one-step images of every model, their errors) into a folder.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.data.digits import load_digits
from tvm_ref.bound.chain import LABELS, measure
from tvm_ref.bound.measuring import Measuring
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.exact_flow import follow
from tvm_ref.experiments import variants
from tvm_ref.experiments.family_measures import adaptive_velocity, step_products
from tvm_ref.flow_map import FlowMap
from tvm_ref.interpolant import interpolate
from tvm_ref.sampling import Jump, sample
from tvm_ref.seeding import EVALUATION, generator
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.report import metrics
from tvm_ref.toy.training import Training

UNWEIGHTED = {"settings": {"power": 0.0}}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "tvm": {},
    "lsd": {"objective": "lsd"},
    "psd": {"objective": "psd"},
    "meanflow": {"objective": "meanflow"} | UNWEIGHTED,
    "meanflow-weighted": {"objective": "meanflow"},
    "imf": {"objective": "imf"} | UNWEIGHTED,
    "fm": {"objective": "fm"},
}
SETTINGS: dict[str, Any] = {"width": 128, "batch_size": 128, "lr": 0.01, "ema": 0.99}  # of every training
BANDWIDTHS = [k / 100 for k in range(4, 61)]  # that are tried; pixels are in [-1, 1]
MEASURING = Measuring(points=64, grid=24)  # of the bound
COLUMNS = 12  # of the picture
POINTS = 1000  # samples that errors are measured on
TIMES = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # at which the weight's bias is measured
FEW = 32  # samples that it is measured on


class ImageMixture(GaussianMixture):
    """Images with a Gaussian around each, shifted to mean 0 and scaled by one number to a mean square of 1 per pixel.

    Args:
        images: [N, ...].
        bandwidth: deviation of the Gaussians, in the images' own units.
        labels: [N], or None.
    """

    def __init__(self, images: Tensor, bandwidth: float, labels: Tensor | None = None):
        x = images.flatten(1).double()
        self.mean = x.mean(0)
        self.deviation = math.sqrt(float((x - self.mean).square().mean()) + bandwidth**2)
        super().__init__((x - self.mean) / self.deviation, bandwidth / self.deviation, labels=labels)

    def restore(self, x: Tensor) -> Tensor:
        """Turn standardised images [N, D] into those of the images' own units."""
        return self.mean + self.deviation * x


def held_out_likelihood(train: Tensor, held_out: Tensor, bandwidth: float) -> float:
    """Return the mean log density of images [M, ...] under Gaussians around others [N, ...]."""
    x = held_out.flatten(1).double()
    return float(GaussianMixture(train.flatten(1), bandwidth).log_density(x, torch.zeros(len(x))).mean())


def configs(names: Sequence[str], steps: int, w: float | None, dim: int) -> dict[str, ToyConfig]:
    """Make the configuration of each objective, with as many steps as cost `steps` of TVM."""
    base = ToyConfig(**SETTINGS, conditional=w is not None, w=1.0 if w is None else w)
    made = {name: replace(base, **OBJECTIVES[name]) for name in names}
    unit = steps * step_products(base, dim=dim)
    return {name: replace(c, steps=round(unit / step_products(c, dim=dim))) for name, c in made.items()}


def bias_of_the_weight(mixture: GaussianMixture) -> dict[str, float]:
    """Measure adaptive_velocity - u by time, in deviations of v given x_t, and what it does to images.

    "in images" is the RMSE between the images of both velocities' flows from the same noise.
    """
    found, x1 = {}, torch.randn(FEW, mixture.dim, generator=generator(EVALUATION), dtype=torch.float64)
    for time in TIMES:
        t = torch.full((FEW,), time, dtype=torch.float64)
        x = interpolate(mixture.sample(FEW, generator(EVALUATION, 1))[0], x1, t)
        difference = adaptive_velocity(mixture, x, t) - mixture.velocity(x, t)
        found[f"t = {time}"] = float((difference.square().mean() / mixture.velocity_variance(x, t).mean()).sqrt())
    one, steps = torch.ones(FEW, dtype=torch.float64), 12
    images = [
        follow(velocity, x1, one, 0 * one, mixture.time_scale, steps)
        for velocity in (mixture.velocity, lambda x, t: adaptive_velocity(mixture, x, t))
    ]
    return found | {"in images": float((images[1] - images[0]).square().sum(1).mean().sqrt())}


def draw(path: Path, mixture: ImageMixture, reference: metrics.Reference, models: Mapping[str, Jump]) -> None:
    """Draw noise, the exact flow's images, and one-step images of each model above their errors."""
    from matplotlib.figure import Figure  # which --help need not wait for

    rows = {"noise": mixture.restore(reference.noise), "exact flow": mixture.restore(reference.exact)}
    for name, model in models.items():
        rows[name] = mixture.restore(sample(model, reference.noise.float(), 1, reference.condition).double())
        rows[f"error of {name}"] = rows[name] - rows["exact flow"]
    figure, side = Figure((COLUMNS * 0.6 + 2, len(rows) * 0.6)), math.isqrt(mixture.dim)
    for ax, (name, x) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
        cells = torch.nn.functional.pad(x[:COLUMNS].view(-1, side, side), (0, 1), value=math.nan)
        ax.imshow(
            cells.transpose(0, 1).flatten(1).numpy(), cmap="RdBu_r" if "error" in name else "gray", vmin=-1, vmax=1
        )
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    figure.subplots_adjust(0.24, 0.01, 0.99, 0.99, hspace=0.08)
    figure.savefig(path, dpi=100)


def table(report: dict[str, Any]) -> str:
    """Format all that was measured."""
    lines = [f"{'bandwidth':<28}{report['bandwidth']:g} in [-1, 1]; log likelihood of held-out images by bandwidth:"]
    lines += ["  ".join(f"{h} {value:.1f}" for h, value in report["held_out"].items())]
    lines += [f"{'RMSE of the mean image':<28}{report['mean image']:.3f}"]
    lines += [variants.table(report)] * bool(report["variants"])
    if "model" in report:
        lines += ["tvm, seed 0", metrics.table(report["model"])]
    lines += [f"{LABELS.get(name, name):<28}{value:.4g}" for name, value in report.get("chain", {}).items()]
    lines += [f"{'bias of the weight, ' + name:<34}{value:.4g}" for name, value in report.get("bias", {}).items()]
    return "\n".join(lines)


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.experiments.oracle", __doc__)
    p.add_argument("--objectives", nargs="+", choices=tuple(OBJECTIVES), default=tuple(OBJECTIVES), help="to train")
    p.add_argument("--w", type=float, help="train with classes and this guidance weight (default: without classes)")
    p.add_argument("--steps", type=int, default=600, help="budget of each training, in steps of TVM")
    p.add_argument("--seeds", type=int, default=2, help="seeds per objective")
    p.add_argument("--out", type=Path, default=Path("runs/imagenet/oracle"), help="folder to write")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    o = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        require_at_least(1, steps=o.steps)
        require_at_least(0, seeds=o.seeds)
        (train, labels), (held_out, _) = load_digits()
        made = configs(o.objectives, o.steps, o.w, train[0].numel())
        require_free(o.out, [variants.RESULTS], "measurements")
        o.out.mkdir(parents=True, exist_ok=True)
    with command.errors(f"{o.out} holds the trainings that were finished"):
        likelihood = {h: held_out_likelihood(train, held_out, h) for h in BANDWIDTHS}
        bandwidth = max(likelihood, key=lambda h: likelihood[h])
        mixture = ImageMixture(train, bandwidth, labels)
        reference = metrics.make_reference(mixture, w=o.w, points=POINTS)
        report: dict[str, Any] = {
            "bandwidth": bandwidth,
            "held_out": {h: likelihood[h] for h in sorted({0.1, 0.2, bandwidth, 0.4})},
            "mean image": float(reference.exact.square().sum(1).mean().sqrt()),
            "variants": {},
        }
        models: dict[str, Jump] = {}
        trainings = variants.train(made, lambda _, config: Training(config, mixture), o, report, o.out, reference)
        for name, training in trainings:
            models.setdefault(name, training.evaluated)
        tvm = models.get("tvm")
        if isinstance(tvm, FlowMap):
            report["model"] = {str(n): metrics.evaluate(tvm, reference, n) for n in (1, 2, 4)}
        if isinstance(tvm, FlowMap) and o.w is None:
            bound = measure(tvm, mixture, MEASURING.draw(mixture), MEASURING.times(mixture), mixture.time_scale)
            report["chain"] = bound.values | {
                "int L": bound.lipschitz_integral,
                "violated links": len(bound.violations()),
            }
        if not o.seeds:
            report["bias"] = bias_of_the_weight(mixture)
        write_atomically(o.out / variants.RESULTS, json.dumps(report, indent=2) + "\n")
        draw(o.out / "oracle.png", mixture, reference, models)
    print(f"{table(report)}\n{o.out}")
    return 0


if __name__ == "__main__":
    run(main)
