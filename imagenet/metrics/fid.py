"""FID and related metrics of images against a reference."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from imagenet.metrics.frechet import frechet_distance, gaussian_statistics
from imagenet.metrics.inception import Extractor, Features
from imagenet.metrics.references import Reference, check_reference
from imagenet.sampler import BATCH
from tvm_ref.cli.progress import progress

NEIGHBOURS = 3  # of precision and recall, as in ADM

Candidates = dict[str, tuple[Iterable[Tensor], int]]  # images to measure, by name: batches uint8 [B, 3, H, W], number


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


def metrics_of(features: Features, reference: Reference, real: Features | None) -> dict[str, float]:
    """Compute what can be measured of images against a reference; `real` are features of its images, if it has any.

    Precision, recall and the inception score are torch-fidelity's. The Frechet distance is that of frechet.py: the same
    formula, exact also where there are fewer images than features.

    Raises:
        ValueError: features that are not finite, or of another size than the reference's.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    measured: dict[str, float] = {}
    if reference.pool is not None:
        measured["fid"] = frechet_distance(*gaussian_statistics(features.pool), *reference.pool)
    score = isc_features_to_metric(features.logits)
    measured["inception_score"] = score["inception_score_mean"]
    measured["inception_score_std"] = score["inception_score_std"]
    if real is not None:
        fractions = prc_features_to_metric(
            features.pool, real.pool, prc_neighborhood=NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        measured |= {name: fractions[name] for name in ("precision", "recall")}
    return measured


def measure(candidates: Candidates, reference: Reference, extractor: Extractor, size: int = BATCH) -> dict[str, Any]:
    """Measure images against a reference: {"reference": about it, "figures": by name of the images}.

    Args:
        candidates: images to measure.
        reference: reference to compare with.
        extractor: computes features.
        size: number of reference images at a time.

    Raises:
        ValueError: features that do not fit the reference's.
    """
    real = None
    if reference.images is not None:
        real = extract(reference.images.batches(size), len(reference.images), extractor, "reference", reference)
        reference = replace(reference, pool=reference.pool or gaussian_statistics(real.pool))
    measured = {
        name: {"samples": count, **metrics_of(extract(images, count, extractor, name, reference), reference, real)}
        for name, (images, count) in candidates.items()
    }
    about = {"name": reference.name, "images": len(reference.images) if reference.images else None}
    return {"reference": about, "figures": measured}
