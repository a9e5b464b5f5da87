"""Measure images, or a model, against a reference: FID, inception score, precision and recall.

    python imagenet/evaluate.py samples256 --reference VIRTUAL_imagenet256_labeled.npz    a folder of images
    python imagenet/evaluate.py samples256.npz --reference img256.pkl                     images as ADM stores them
    python imagenet/evaluate.py imagenet256-w2.safetensors --reference img256.pkl --steps 1 2 --count 50000
    python imagenet/evaluate.py runs/imagenet/digits --steps 1 4      digits and own pictures have their own metrics

A model's images are made on the fly, the same that sample.py draws; sample.py under torchrun is faster for many.
The reference decides which metrics are computed: statistics (mu, sigma) give FID, images also precision and recall; the
inception score needs no reference. references.py lists the formats. Pickles are read without
executing anything in them.

The features are those of 2015's Inception, from torch-fidelity, whose weights must be on this machine (--inception); no
other network replaces it. Published figures use 50,000 samples; FID of fewer is larger (biased). Figures are
comparable only against the same reference.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagenet.data.image_files import ImageFiles
from imagenet.metrics.fid import Candidates, measure
from imagenet.metrics.inception import Extractor, Inception
from imagenet.metrics.own import Metrics, measure_model, own_metrics, sets_of
from imagenet.metrics.references import read_reference
from imagenet.model import distributed
from imagenet.sampler import Generator, add_model_options, load_model
from imagenet.weights import find_model
from tvm_ref.cli.errors import UserError, require
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run

LEAST = 10  # images: the inception score is a mean over this many parts
PUBLISHED = 50_000  # samples that published figures use
NAMES = {"fid": "FID", "inception_score": "IS", "inception_score_std": "+-"}


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("evaluate.py", __doc__)
    p.add_argument("source", type=Path, help="images (a folder, a .npz) or a model (a run's folder, a .safetensors)")
    p.add_argument(
        "--reference",
        type=Path,
        help="a .npz or .pkl of statistics, or images; digits, fashion and own pictures need none",
    )
    p.add_argument("--data-path", help="folder of Fashion-MNIST, for its models, if the weights do not say")
    p.add_argument("--count", type=int, help=f"number of images to measure (default: all; for a model {PUBLISHED:,})")
    p.add_argument("--steps", type=int, nargs="+", default=[1], help="for a model: numbers of sampling steps")
    p.add_argument("--inception", type=Path, help="file of Inception's weights (default: where torch.hub keeps it)")
    p.add_argument("--out", type=Path, help="JSON file to write the metrics to")
    add_model_options(p.add_argument_group("options for a model"))
    return p


def model_images(generator: Generator, steps: list[int], count: int, size: int) -> Candidates:
    """Return a model's images by number of steps, drawn when they are needed, `size` at a time."""

    def drawn(n: int) -> Any:
        for pixels in generator.batches(range(count), n, size):
            yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()

    return {f"{n} NFE": (drawn(n), count) for n in steps}


def stored_images(source: Path, count: int | None, size: int) -> Candidates:
    """Return the images of a folder or .npz, or the first `count` of them, `size` at a time.

    Raises:
        UserError: no images there, or too few.
    """
    images = ImageFiles(source)
    if images.left_out:
        print(f"warning: {images.left_out} files are left out: no images by their endings", file=sys.stderr)
    count = count or len(images)
    require(count <= len(images), f"{source} holds {len(images)} images, fewer than --count {count}")
    require(count >= LEAST, f"{source} holds {count} images; {LEAST} are the least that can be measured")
    return {"images": (images.batches(size, count), count)}


def measure_own(generator: Generator, steps: list[int], metrics: Metrics) -> dict[str, Any]:
    """Score a model by the metrics of its own data: {"reference": about them, "figures": by number of steps}."""
    scores = measure_model(generator, steps, metrics).items()
    figures = {f"{n} NFE": {"samples": len(metrics.labels), "sets": sets_of(metrics), **found} for n, found in scores}
    names = {"digits": "scikit-learn's digits", "fashion": "Fashion-MNIST"}
    name = names.get(generator.config.data, "the pictures that it was trained on")
    return {"reference": {"name": name}, "figures": figures}


def table(report: dict[str, Any]) -> str:
    """Format the metrics, the reference, and what could not be measured."""
    lines, reference, measured = [], report["reference"], report["figures"]
    for name, row in measured.items():
        cells = [f"{NAMES.get(key, key)} {value:.4g}" for key, value in row.items() if key not in ("samples", "sets")]
        sets = f"mean of {row['sets']} sets of " if row.get("sets", 1) > 1 else ""
        lines.append(f"{name:<8} {'   '.join(cells)}   ({sets}{row['samples']:,} samples)")
    count = reference.get("images")
    lines.append(f"against {reference['name']}" + (f", {count:,} images" if count else ""))
    if "inception_score" in row:
        if "precision" not in row:
            lines.append("no precision and recall: the reference has no images")
        if row["samples"] != PUBLISHED:
            lines.append(f"published figures use {PUBLISHED:,} samples; FID of fewer is biased: larger")
    return "\n".join(lines)


def main(argv: list[str] | None = None, extractor: Extractor | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `extractor` and `vae` replace Inception and the autoencoder. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    source, steps, size = options.source, options.steps, options.batch_size
    with command.errors(), distributed.process_group(options.device) as world:
        require_at_least(1, steps=min(steps), batch_size=size)
        require_at_least(LEAST, count=PUBLISHED if options.count is None else options.count)
        require(world.size == 1, "this runs as one process; sample.py under torchrun draws images faster")
        require_new(options.out)  # a folder that cannot be made is noticed before the work
        source = find_model(source)
        is_model = source.suffix == ".safetensors" or (source / "config.json").is_file()
        generator = load_model(options, world, vae) if is_model else None
        own = (
            None if generator is None or options.reference else own_metrics(generator.config, source, options.data_path)
        )
        if generator is not None and own is not None:
            free = options.count is None and options.classes is None
            require(free, "--count and --classes go with --reference; without, both are those of the held-out pictures")
            report = measure_own(generator, steps, own)
        elif options.reference is None:
            raise UserError("--reference is needed: statistics (.npz, .pkl) or images to measure against")
        else:
            reference = read_reference(options.reference)
            if generator is not None:
                candidates = model_images(generator, steps, options.count or PUBLISHED, size)
            else:
                candidates = stored_images(source, options.count, size)
            extractor = extractor or Inception(options.inception, world.device)
            report = measure(candidates, reference, extractor, size)
        report = {"source": source.name, **report}
        print(table(report))
        if options.out is not None:
            write_atomically(options.out, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
