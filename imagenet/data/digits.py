"""The digits that ship with scikit-learn: 1437 images to learn from, 360 held out, and the judges of what is generated.

Judged are as many samples as there are held-out images, of the same labels, each from noise. So few leave their scores
to chance; of a model they are averaged over SETS such sets, each from other noise:

    accuracy         share that a support vector machine, trained on the real images, gives the label asked for
    frechet          Frechet distance of the pixels (64 numbers in [0, 1]) to the real images'
    frechet_held_out the same of the held-out images, one set of 360 real ones: no floor, as a model has seen the others
    recall           share of the real images within reach of the samples (Kynkaanniemi et al. 2019, k = 3), by the
                     features of a small network that was trained to tell digits
"""

import dataclasses
import functools
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.metrics.frechet import Gaussian, frechet_distance, gaussian_statistics, precision_recall
from imagenet.sampler import Generator
from tvm_ref.cli.errors import UserError

TEST = 360  # images held out
SETS = 8  # sets of as many samples whose scores are averaged
NEIGHBOURS = 3  # k of the recall
FEATURES = 64  # hidden units of the network that the recall looks through
# what one-step samples must reach: at least, or at most for the distance; the controls do not
ACCEPTED = {"accuracy": 0.95, "frechet": 0.40, "recall": 0.45}

Pixels = NDArray[np.float32]  # [N, 64], each in [0, 1]


class Split(NamedTuple):
    """Images float32 [N, 1, 8, 8] in [-1, 1] and labels [N], to learn from and held out.

    Attributes:
        train: images, labels.
        test: images, labels.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def load_digits() -> Split:
    """Load the digits, split once and for all, with every class in both parts in proportion.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise UserError("the digits come with scikit-learn: pip install -e '.[imagenet]'") from None
    stored = datasets.load_digits()
    x = (stored.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(x, stored.target.astype(np.int64), test_size=TEST, stratify=stored.target, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Split((x_train, y_train), (x_test, y_test))


def pixels(x: Tensor) -> Pixels:
    """Flatten images [N, 1, 8, 8] in [-1, 1] to rows of 64 numbers, clipped to [0, 1]."""
    return ((x.float().cpu().clamp(-1, 1) + 1) / 2).flatten(1).numpy()


class Judges:
    """Classifiers and statistics of the real digits."""

    def __init__(self) -> None:
        from sklearn.neural_network import MLPClassifier
        from sklearn.svm import SVC

        (x_train, y_train), (x_test, self.labels) = load_digits()
        self._train, self._test = pixels(x_train), pixels(x_test)
        self._machine = SVC(kernel="rbf", gamma="scale").fit(self._train, y_train.numpy())
        self._network = MLPClassifier((FEATURES,), random_state=0, max_iter=60, early_stopping=True)
        self._network.fit(self._train, y_train.numpy())
        self._real = gaussian_statistics(self._train)
        self.held_out = self._frechet(self._test)

    def judge(self, x: Tensor) -> dict[str, float]:
        """Measure samples x [360, 1, 8, 8] that were generated for the labels `self.labels`."""
        samples = pixels(x)
        accuracy = float((self._machine.predict(samples) == self.labels.numpy()).mean())
        recall = precision_recall(self._features(self._train), self._features(samples), NEIGHBOURS)[1]
        figures = {
            "accuracy": accuracy,
            "frechet": self._frechet(samples),
            "frechet_held_out": self.held_out,
            "recall": recall,
        }
        return {name: round(value, 4) for name, value in figures.items()}

    def _frechet(self, samples: Pixels) -> float:
        """Return the Frechet distance of samples to the images to learn from."""
        generated: Gaussian = gaussian_statistics(samples)
        return frechet_distance(*self._real, *generated)

    def _features(self, samples: Pixels) -> Pixels:
        """Return the activations of the network's hidden layer [N, FEATURES]."""
        return np.maximum(samples @ self._network.coefs_[0] + self._network.intercepts_[0], 0)


@functools.cache
def trained_judges() -> Judges:
    """Return the judges, trained once."""
    return Judges()


def class_means(labels: Tensor) -> Tensor:
    """Return the mean image of each label's class [N, 1, 8, 8]: accurate and without variety, it must not pass."""
    x, y = load_digits().train
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return means[labels]


def accepted(figures: dict[str, float]) -> bool:
    """Tell whether figures reach ACCEPTED."""
    return (
        figures["accuracy"] >= ACCEPTED["accuracy"]
        and figures["frechet"] <= ACCEPTED["frechet"]
        and figures["recall"] >= ACCEPTED["recall"]
    )


def judge_model(generator: Generator, nfes: Sequence[int]) -> dict[int, dict[str, float]]:
    """Measure a model of digits by the number of steps: mean scores of SETS sets of samples of the held-out labels.

    Set k consists of samples k * TEST, ..., (k + 1) * TEST - 1, so that each has other noise.

    Args:
        generator: the model; its classes are replaced by those labels.
        nfes: numbers of network evaluations per sample.
    """
    judges = trained_judges()
    generator = dataclasses.replace(generator, classes=judges.labels.tolist())

    def mean(nfe: int) -> dict[str, float]:
        """Average the scores over sets."""
        scores = [judges.judge(generator.samples(range(k * TEST, (k + 1) * TEST), nfe)) for k in range(SETS)]
        return {name: round(statistics.fmean(s[name] for s in scores), 4) for name in scores[0]}

    return {nfe: mean(nfe) for nfe in nfes}
