"""FID and its relatives: of images against a reference, and of a model while it trains."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.config import Config
from imagenet.distributed import World
from imagenet.metrics.frechet import Gaussian, frechet_distance, gaussian_of_sums, gaussian_statistics
from imagenet.metrics.inception import Extractor, Features, Inception
from imagenet.metrics.references import Reference, check_reference, read_reference
from imagenet.sampler import BATCH, Generator
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.progress import progress

NEIGHBOURS = 3  # of precision and recall, as in ADM

Candidates = dict[str, tuple[Iterable[Tensor], int]]  # images to measure, by name: batches uint8 [B, 3, H, W], number
Metric = Callable[[Generator, int, World], dict[str, float]]  # numbers by name, of a model at a number of steps


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
        reference = replace(reference, pool=reference.pool or gaussian_statistics(real.pool))
    measured = {
        name: {"samples": count, **metrics_of(extract(images, count, extractor, name, reference), reference, real)}
        for name, (images, count) in candidates.items()
    }
    about = {"name": reference.name, "images": len(reference.images) if reference.images else None}
    return {"reference": about, "figures": measured}


class Fid:
    """The Frechet distance of a model's images to a reference; all processes draw and measure a part of them.

    Args:
        reference: statistics of real images.
        extractor: of features.
        count: images, a multiple of the number of processes.
    """

    def __init__(self, reference: Reference, extractor: Extractor, count: int):
        if reference.pool is None:
            raise UserError(f"{reference.name} holds no mu and sigma, which evaluate_every needs")
        self.reference, self.real, self.extractor, self.count = reference, reference.pool, extractor, count

    def __call__(self, generator: Generator, steps: int, world: World) -> dict[str, float]:
        """Measure a model; all processes take part."""
        return {"fid": frechet_distance(*self.statistics(generator, steps, world), *self.real)}

    def statistics(self, generator: Generator, steps: int, world: World) -> Gaussian:
        """Compute mean and covariance of the features of samples 0 to count - 1.

        Raises:
            ValueError: features of another size than the reference's.
        """
        size = len(self.real.mean)
        total, squares = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
        for pixels in generator.batches(world.partition(self.count), steps):
            features = self.extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
            check_reference(Reference(self.reference.name, self.real), features)
            x = features.pool.double()  # [B, D]
            total += x.sum(0)
            squares += x.T @ x
        return gaussian_of_sums(world.sum(total).numpy(), world.sum(squares).numpy(), self.count)


def make_metric(config: Config, reference: Path | None, inception: Path | None, count: int, world: World) -> Metric:
    """Prepare to measure a run, so that all that could be missing is noticed before training.

    Args:
        config: of the run.
        reference: statistics of real images; digits need none.
        inception: file of Inception's weights; None is where torch.hub keeps it.
        count: images to measure.
        world: the processes.

    Raises:
        ValueError, OSError: a reference without mu and sigma, no Inception, a count that processes cannot share.
    """
    if reference is None:
        if config.data != "digits":
            raise UserError("evaluate_every needs a reference: mu and sigma of real images (.npz, .pkl)")
        from imagenet.metrics.digits import measure_model

        return lambda generator, steps, _: measure_model(generator, [steps])[steps]
    if count % world.size:  # else sharded weights would be asked for by some processes alone
        raise UserError(f"evaluate_count {count} is no multiple of {world.size} processes")
    return Fid(read_reference(reference), Inception(inception, world.device), count)
