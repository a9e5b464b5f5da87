"""Measure models of digits, clothes or your own pictures: mean scores of sets of samples, without Inception.

A set of samples has as many images as are held out, with the same labels, each from its own noise. Scores of small
sets are noisy, so they are averaged over SETS sets, or fewer if those would have more than SAMPLES images.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from imagenet.config import Config
from imagenet.data.pictures import INDEX, read_pictures
from imagenet.metrics.digits import DigitMetrics, digit_metrics
from imagenet.metrics.fashion import FashionMetrics, fashion_metrics
from imagenet.metrics.pictures import NEIGHBOURS, PictureMetrics
from imagenet.sampler import BATCH, Generator
from imagenet.weights import read_provenance
from tvm_ref.cli.errors import UserError

SETS, SAMPLES = 8, 2880  # of samples, and images in all of them: 8 sets of 360 for digits

Metrics = DigitMetrics | FashionMetrics | PictureMetrics


def sets_of(metrics: Metrics) -> int:
    """Return the number of sets of samples that a model is measured by."""
    return min(SETS, max(1, SAMPLES // len(metrics.labels)))


def own_metrics(config: Config, source: Path, data_path: str | None = None) -> Metrics | None:
    """Return the metrics of a run's data; None if there are none, or too few pictures are held out.

    Args:
        config: the model's configuration.
        source: the folder of the run, or weights in it.
        data_path: where Fashion-MNIST lies, if the weights do not say.

    Raises:
        UserError: Fashion-MNIST is needed and cannot be had.
    """
    if config.data == "digits":
        return digit_metrics()
    if config.data == "fashion":
        known = read_provenance(source)
        folder = data_path or (known and known.path)
        if not folder:
            raise UserError("--data-path is needed: the folder of Fashion-MNIST")
        return fashion_metrics(folder)
    run = next((path for path in (source, *source.absolute().parents) if (path / INDEX).is_file()), None)
    if config.data != "folder" or run is None:
        return None
    (train, _), (held_out, labels), *_ = read_pictures(run)
    return PictureMetrics(train, held_out, labels) if min(len(train), len(labels)) > NEIGHBOURS else None


def measure_model(generator: Generator, nfes: Sequence[int], metrics: Metrics) -> dict[int, dict[str, float]]:
    """Measure a model by the number of steps: mean scores of sets of samples of the held-out labels.

    Set k of N samples consists of samples k N, ..., (k + 1) N - 1, so that each has other noise.

    Args:
        generator: the model; its classes are replaced by those labels.
        nfes: numbers of network evaluations per sample.
        metrics: metrics of the data that it was trained on.
    """
    n, sets = len(metrics.labels), sets_of(metrics)
    generator = dataclasses.replace(generator, classes=metrics.labels.tolist())

    def draw(k: int, nfe: int) -> Tensor:
        """Draw set k."""
        numbers = range(k * n, (k + 1) * n)
        return torch.cat([generator.samples(numbers[i : i + BATCH], nfe) for i in range(0, n, BATCH)])

    def mean(nfe: int) -> dict[str, float]:
        """Average the scores over sets."""
        scores = [metrics.measure(draw(k, nfe)) for k in range(sets)]
        return {name: round(statistics.fmean(s[name] for s in scores), 4) for name in scores[0]}

    return {nfe: mean(nfe) for nfe in nfes}
