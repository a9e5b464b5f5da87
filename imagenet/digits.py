"""The digits that ship with scikit-learn: 1437 images to learn from, 360 held out, and the judges of what is generated.

Judged are as many samples as there are held-out images, of the same labels, each from noise:

    accuracy         share that a support vector machine, trained on the real images, gives the label asked for
    frechet          Frechet distance of the pixels (64 numbers in [0, 1]) to the real images'
    frechet_floor    that of the held-out images: what a perfect generator scores, as a sample this small is never exact
    recall           share of the real images within reach of the samples (Kynkaanniemi et al. 2019, k = 3), by the
                     features of a small network that was trained to tell digits
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from metrics import Gaussian, frechet_distance, gaussian_statistics, precision_recall
from numpy.typing import NDArray
from torch import Tensor

TEST = 360  # images held out
NEIGHBOURS = 3  # k of the recall
FEATURES = 64  # hidden units of the network that the recall looks through

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
    """The digits, split once and for all, with every class in both parts in proportion.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise ValueError("the digits come with scikit-learn: pip install -e '.[imagenet]'") from None
    stored = datasets.load_digits()
    x = (stored.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(x, stored.target.astype(np.int64), test_size=TEST, stratify=stored.target, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Split((x_train, y_train), (x_test, y_test))


def pixels(x: Tensor) -> Pixels:
    """Images [N, 1, 8, 8] in [-1, 1] as rows of 64 numbers in [0, 1], cut off where they leave it."""
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
        self.floor = self._frechet(self._test)

    def judge(self, x: Tensor) -> dict[str, float]:
        """The figures of samples x [360, 1, 8, 8] of the labels `self.labels`."""
        samples = pixels(x)
        accuracy = float((self._machine.predict(samples) == self.labels.numpy()).mean())
        recall = precision_recall(self._features(self._train), self._features(samples), NEIGHBOURS)[1]
        figures = {
            "accuracy": accuracy, "frechet": self._frechet(samples), "frechet_floor": self.floor, "recall": recall,
        }  # fmt: skip
        return {name: round(value, 4) for name, value in figures.items()}

    def _frechet(self, samples: Pixels) -> float:
        generated: Gaussian = gaussian_statistics(samples)
        return frechet_distance(*self._real, *generated)

    def _features(self, samples: Pixels) -> NDArray[np.float64]:
        """What the network's hidden layer makes of pixels: [N, FEATURES]."""
        return np.maximum(samples @ self._network.coefs_[0] + self._network.intercepts_[0], 0)


def class_means(labels: Tensor) -> Tensor:
    """The mean image of each label's class [N, 1, 8, 8]: accurate and without variety, it must not pass."""
    x, y = load_digits().train
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    return means[labels]
