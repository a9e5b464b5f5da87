"""Measure images, or a model, against a reference: FID, sFID, inception score, precision and recall.

    python imagenet/evaluate.py samples256 --reference VIRTUAL_imagenet256_labeled.npz    a folder of images
    python imagenet/evaluate.py samples256.npz --reference img256.pkl                     images as ADM stores them
    python imagenet/evaluate.py imagenet256-w2.safetensors --reference img256.pkl --steps 1 2 --count 50000
    python imagenet/evaluate.py runs/imagenet/digits --steps 1 4                          digits have their own metrics

A model's images are made on the fly, the same that sample.py draws; sample.py under torchrun is faster for many.
What is measured depends on the reference: statistics (mu, sigma) give FID, spatial ones (mu_s, sigma_s) sFID, images
precision and recall; the inception score needs none. references.py lists the formats. Pickles are read without
executing anything in them.

The features are those of 2015's Inception, from torch-fidelity, whose weights must be on this machine (--inception); no
other network ever stands in. Published figures use 50,000 samples, and FID is larger for fewer. Figures are comparable
only against the same reference.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from imagenet import distributed
from imagenet.data.image_files import ImageFiles
from imagenet.distributed import World
from imagenet.metrics.frechet import frechet_distance, gaussian_statistics
from imagenet.metrics.inception import Extractor, Features, Inception
from imagenet.metrics.references import Reference, check_reference, read_reference
from imagenet.model_options import add_model_options, load_model
from imagenet.sampler import BATCH, Generator
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

LEAST = 10  # images: the inception score is a mean over as many parts
PUBLISHED = 50_000  # samples that published figures use
NEIGHBOURS = 3  # of precision and recall, as in ADM
NAMES = {"fid": "FID", "sfid": "sFID", "inception_score": "IS", "inception_score_std": "+-"}

Candidates = dict[str, tuple[Iterable[Tensor], int]]  # images to measure, by name: batches uint8 [B, 3, H, W], number


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("evaluate.py", __doc__)
    p.add_argument("source", type=Path, help="images (a folder, a .npz) or a model (a run's folder, a .safetensors)")
    p.add_argument("--reference", type=Path, help="a .npz or .pkl of statistics, or images; digits need none")
    p.add_argument("--count", type=int, help=f"images to measure (default: all; of a model: {PUBLISHED:,})")
    p.add_argument("--steps", type=int, nargs="+", default=[1], help="of a model: numbers of steps")
    p.add_argument("--inception", type=Path, help="file of Inception's weights (default: where torch.hub keeps it)")
    p.add_argument("--out", type=Path, help="write the figures as JSON")
    add_model_options(p.add_argument_group("of a model"))
    return p


# Measuring ----------------------------------------------------------------------------------------------------------


def extract(images: Iterable[Tensor], count: int, extractor: Extractor, what: str, reference: Reference) -> Features:
    """Extract features of `count` images that come in batches uint8 [B, 3, H, W], with a progress bar.

    Raises:
        ValueError: those of the first batch cannot be measured against the reference.
    """
    found: list[Features] = []
    with progress(total=count, unit="image", desc=what) as bar:
        for batch in images:
            found.append(extractor(batch))
            if len(found) == 1:
                check_reference(reference, found[0])
            bar.update(len(batch))
    return Features(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def figures(features: Features, reference: Reference, real: Features | None) -> dict[str, float]:
    """Compute what can be measured of images against a reference; `real` are features of its images, if it has any.

    Precision, recall and the inception score are torch-fidelity's. The Frechet distance is that of metrics.py: the same
    formula, sound also where there are fewer images than features.

    Raises:
        ValueError: features that are not finite, or of another size than the reference's.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    measured: dict[str, float] = {}
    if reference.pool is not None:
        measured["fid"] = frechet_distance(*gaussian_statistics(features.pool), *reference.pool)
    if reference.spatial is not None:
        measured["sfid"] = frechet_distance(*gaussian_statistics(features.spatial), *reference.spatial)
    score = isc_features_to_metric(features.logits)
    measured["inception_score"] = score["inception_score_mean"]
    measured["inception_score_std"] = score["inception_score_std"]
    if real is not None:
        shares = prc_features_to_metric(
            features.pool, real.pool, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        measured |= {name: shares[name] for name in ("precision", "recall")}
    return measured


def is_model(source: Path) -> bool:
    """Tell whether a path is that of a run or of weights."""
    return source.suffix == ".safetensors" or (source / "config.json").is_file()


def drawn(generator: Generator, steps: int, count: int, size: int) -> Iterable[Tensor]:
    """Draw a model's images uint8 [B, 3, H, W]."""
    for pixels in generator.batches(range(count), steps, size):
        yield torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def model_images(generator: Generator, steps: list[int], count: int, size: int) -> Candidates:
    """Return a model's images by number of steps, drawn as they are asked for, `size` at a time."""
    return {f"{n} NFE": (drawn(generator, n, count, size), count) for n in steps}


def stored_images(source: Path, count: int | None, size: int) -> Candidates:
    """Return the images of a folder or .npz, or the first `count` of them, `size` at a time.

    Raises:
        ValueError, OSError: no images there, or too few.
    """
    images = ImageFiles(source)
    if images.warning is not None:
        print(images.warning, file=sys.stderr)
    count = count or len(images)
    if count > len(images):
        raise UserError(f"{source} holds {len(images)} images, fewer than --count {count}")
    if count < LEAST:
        raise UserError(f"{source} holds {count} images; {LEAST} are the least that can be measured")
    return {"images": (images.batches(size, count), count)}


def measure(candidates: Candidates, reference: Reference, extractor: Extractor, size: int = BATCH) -> dict[str, Any]:
    """Measure images against a reference: {"reference": about it, "figures": by name of the images}.

    Args:
        candidates: what to measure.
        reference: what to measure it against.
        extractor: of features.
        size: images of the reference at a time.

    Raises:
        ValueError: features that do not fit the reference's.
    """
    real = None
    if reference.images is not None:
        real = extract(reference.images.batches(size), len(reference.images), extractor, "reference", reference)
        reference = reference.completed(real)
    measured = {
        name: {"samples": count, **figures(extract(images, count, extractor, name, reference), reference, real)}
        for name, (images, count) in candidates.items()
    }
    about = {"name": reference.name, "images": len(reference.images) if reference.images else None}
    return {"reference": about, "figures": measured}


def measure_digits(generator: Generator, steps: list[int]) -> dict[str, Any]:
    """Score a model of digits (digits.py): {"reference": about it, "figures": by number of steps}."""
    from imagenet.data.digits import TEST
    from imagenet.metrics.digits import SETS, measure_model

    scores = {
        f"{n} NFE": {"samples": TEST, "sets": SETS, **found} for n, found in measure_model(generator, steps).items()
    }
    return {"reference": {"name": "scikit-learn's digits"}, "figures": scores}


# The command --------------------------------------------------------------------------------------------------------


def table(report: dict[str, Any]) -> str:
    """Format the figures, what they were measured against, and what could not be measured."""
    lines, reference, measured = [], report["reference"], report["figures"]
    for name, row in measured.items():
        cells = [f"{NAMES.get(key, key)} {value:.4g}" for key, value in row.items() if key not in ("samples", "sets")]
        sets = f"mean of {row['sets']} sets of " if "sets" in row else ""
        lines.append(f"{name:<8} {'   '.join(cells)}   ({sets}{row['samples']:,} samples)")
    count = reference.get("images")
    lines.append(f"against {reference['name']}" + (f", {count:,} images" if count else ""))
    if "inception_score" in row:
        if "sfid" not in row:
            lines.append("no sFID: the reference has no spatial statistics (mu_s, sigma_s)")
        if "precision" not in row:
            lines.append("no precision and recall: the reference has no images")
        if row["samples"] != PUBLISHED:
            lines.append(f"published figures use {PUBLISHED:,} samples; FID is larger for fewer")
    return "\n".join(lines)


def measure_asked(
    options: argparse.Namespace, world: World, extractor: Extractor | None, vae: nn.Module | None
) -> dict[str, Any]:
    """Measure what the options ask for; returns what --out holds.

    Raises:
        ValueError, OSError: bad input.
    """
    require_at_least(1, steps=min(options.steps), batch_size=options.batch_size)
    if options.count is not None:
        require_at_least(LEAST, count=options.count)
    if world.size > 1:
        raise UserError("this runs as one process; sample.py under torchrun draws images faster")
    require_new(options.out)
    if options.out is not None:  # a folder that cannot be made is noticed before the work
        options.out.parent.mkdir(parents=True, exist_ok=True)
    about, size = {"source": options.source.name}, options.batch_size
    generator = load_model(options, world, vae) if is_model(options.source) else None
    if options.reference is None:
        if generator is not None and generator.config.data == "digits":
            return about | measure_digits(generator, options.steps)
        raise UserError("--reference is needed: statistics (.npz, .pkl) or images to measure against")
    reference = read_reference(options.reference)
    if generator is not None:
        candidates = model_images(generator, options.steps, options.count or PUBLISHED, size)
    else:
        candidates = stored_images(options.source, options.count, size)
    return about | measure(candidates, reference, extractor or Inception(options.inception, world.device), size)


def main(argv: list[str] | None = None, extractor: Extractor | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `extractor` and `vae` replace Inception and the autoencoder. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors(), distributed.process_group(options.device) as world:
        report = measure_asked(options, world, extractor, vae)
        print(table(report))
        if options.out is not None:
            write_atomically(options.out, json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    run(main)
