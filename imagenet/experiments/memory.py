"""Ask of models of the digits if they remember: how near samples are to images that were learned, and to held-out ones.

    python -m imagenet.experiments.memory runs/imagenet/digits                          one model
    python -m imagenet.experiments.memory runs/imagenet/a runs/imagenet/b --out m.png   several, and a picture

Of each model and number of steps the table has

    trained       steps of its training
    frechet       Frechet distance to the images to learn from, as in metrics.json
    nearest       median distance to the nearest image to learn from; a pixel is in [0, 1]
    nearer        probability that a sample is nearer to one than a held-out image is: 0.5 if it is as far, 1 if copied
    learned first fraction of samples whose nearest image, of all, is one to learn from: with 1437 of those and 360 held
                  out 0.80 if neither is favoured, however blurred samples are; 1 if copied

Scores are means over 8 sets of 360 samples with the labels of the held-out images, each from noise of its own. Controls
are the held-out images (none is its own nearest), as many images to learn from, at random, and the mean image of each
class. The picture has ten samples of each model in one step, above the nearest images to learn from.
"""

import statistics
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from imagenet.data.digits import load_digits
from imagenet.data.image_files import grid, save_png, to_pixels
from imagenet.metrics.digits import class_means, digit_metrics, pixels
from imagenet.metrics.own import sets_of
from imagenet.sampler import load_generator
from tvm_ref.cli.errors import require, user_files
from tvm_ref.cli.files import require_new, require_suffix
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

distances = partial(torch.cdist, compute_mode="donot_use_mm_for_euclid_dist")  # zero between equal images
COLUMNS = ("frechet", "nearest", "nearer", "learned first")


def memory(samples: Tensor, learned: Tensor, held_out: Tensor) -> dict[str, float]:
    """Measure nearness of samples [N, D] to images to learn from [M, D] and to others, held out [K, D].

    Ties count as half. A sample equal to a held-out image is taken for that image, which is not its own nearest.
    """
    to_learned, usual = distances(samples, learned).amin(1), distances(held_out, learned).amin(1)
    to_held_out = distances(samples, held_out)
    to_held_out = to_held_out.masked_fill(to_held_out == 0, torch.inf).amin(1)
    return {
        "nearest": float(to_learned.median()),
        "nearer": first(to_learned[:, None], usual),
        "learned first": first(to_learned, to_held_out),
    }


def first(a: Tensor, b: Tensor) -> float:
    """Return the probability that a < b, half of that of a = b added."""
    return float(((a < b).double() + (a == b).double() / 2).mean())


def measure(sets: Iterable[Tensor]) -> dict[str, float]:
    """Measure sets of samples [360, 1, 8, 8]; returns the mean of each of COLUMNS."""
    scores = []
    for x in sets:
        points = (torch.from_numpy(pixels(images)) for images in (x, *(part[0] for part in load_digits())))
        scores.append(memory(*points) | {"frechet": digit_metrics().measure(x)["frechet"]})
    return {name: statistics.fmean(score[name] for score in scores) for name in COLUMNS}


def controls() -> dict[str, dict[str, float]]:
    """Measure what is not a model's."""
    (x_train, y_train), (x_test, y_test) = load_digits()
    shuffled = x_train[torch.randperm(len(x_train), generator=torch.Generator().manual_seed(0))]
    whole = len(x_train) // len(x_test)
    return {
        "held-out images": measure([x_test]),
        "images to learn from": measure(shuffled.split(len(x_test))[:whole]),
        "mean of each class": measure([class_means(x_train, y_train, y_test)]),
    }


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("python -m imagenet.experiments.memory", __doc__)
    p.add_argument("sources", nargs="+", help="folders of runs of digits, or .safetensors files")
    p.add_argument("--steps", nargs="+", type=int, default=[1, 4], help="network evaluations per sample")
    p.add_argument("--out", type=Path, help="picture to write, .png")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    command = parser()
    o = command.parse_args(argv)
    with command.errors(), user_files():
        labels = load_digits().test[1].tolist()
        require_at_least(1, steps=min(o.steps))
        if o.out is not None:
            require_suffix(o.out, ".png")
            require_new(o.out)
        models = {source: load_generator(source, classes=labels) for source in o.sources}
        for source, model in models.items():
            require(model.config.data == "digits", f"{source} is not a model of digits")
    table = {("", "", name): found for name, found in controls().items()}
    n, sets = len(labels), sets_of(digit_metrics())
    for source, model in progress(models.items(), "sampling", leave=False):
        for steps in o.steps:
            found = measure(model.samples(range(k * n, (k + 1) * n), steps) for k in range(sets))
            table[str(model.config.steps), str(steps), source] = found
    print(f"{'trained':>7} {'NFE':>4} " + " ".join(f"{name:>13}" for name in COLUMNS))
    for (trained, steps, source), found in table.items():
        print(f"{trained:>7} {steps:>4} " + " ".join(f"{found[name]:>13.3f}" for name in COLUMNS) + f"  {source}")
    if o.out is not None:
        rows = []
        for model in models.values():
            x, learned = replace(model, classes=range(10)).samples(range(10), 1), load_digits().train[0]
            rows += [x, learned[distances(x.flatten(1), learned.flatten(1)).argmin(1)]]
        save_png(o.out, grid(to_pixels(torch.cat(rows)), 10))
    return 0


if __name__ == "__main__":
    run(main)
