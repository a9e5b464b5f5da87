"""The metrics of generated digits, against the real ones; own.py takes their means over sets of samples.

    accuracy         fraction of samples to which a support vector machine, trained on real images, gives their label
    frechet          Frechet distance of the pixels (64 numbers in [0, 1]) to those of the images to learn from
    frechet_held_out the same of the held-out images, one set of 360: no lower bound, as a model has seen the others
    recall           fraction of real images within reach of the samples (Kynkaanniemi et al. 2019, k = 3), in the
                     features of a small network that was trained to tell digits

Samples have the labels of the held-out images.
"""

import functools

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.data.digits import load_digits
from imagenet.metrics.frechet import frechet_distance, gaussian_statistics, precision_recall

FEATURES = 64  # hidden units of the network in whose features recall is measured
# what one-step samples must reach: at least, or at most for the distance; the controls do not
ACCEPTED = {"accuracy": 0.95, "frechet": 0.40, "recall": 0.45}

Pixels = NDArray[np.float32]  # [N, 64], each in [0, 1]


def pixels(x: Tensor) -> Pixels:
    """Flatten images [N, 1, 8, 8] in [-1, 1] to rows of 64 numbers, clipped to [0, 1]."""
    return ((x.float().cpu().clamp(-1, 1) + 1) / 2).flatten(1).numpy()


class DigitMetrics:
    """The metrics, with a classifier, a network of features and statistics of the real digits.

    Attributes:
        labels: [360], those of the held-out images; samples have the same.
        held_out: the Frechet distance of the held-out images.
    """

    def __init__(self) -> None:
        from sklearn.neural_network import MLPClassifier
        from sklearn.svm import SVC

        (x_train, y_train), (x_test, self.labels) = load_digits()
        self._train = pixels(x_train)
        self._classifier = SVC(kernel="rbf", gamma="scale").fit(self._train, y_train.numpy())
        self._network = MLPClassifier((FEATURES,), random_state=0, max_iter=60, early_stopping=True)
        self._network.fit(self._train, y_train.numpy())
        self._real = gaussian_statistics(self._train)
        self.held_out = self._frechet(pixels(x_test))

    def measure(self, x: Tensor) -> dict[str, float]:
        """Measure samples x [360, 1, 8, 8] that were generated for the labels `self.labels`."""
        samples = pixels(x)
        metrics = {
            "accuracy": float((self._classifier.predict(samples) == self.labels.numpy()).mean()),
            "frechet": self._frechet(samples),
            "frechet_held_out": self.held_out,
            "recall": precision_recall(self._features(self._train), self._features(samples))[1],
        }
        return {name: round(value, 4) for name, value in metrics.items()}

    def _frechet(self, samples: Pixels) -> float:
        """Return the Frechet distance of samples to the images to learn from."""
        return frechet_distance(*self._real, *gaussian_statistics(samples))

    def _features(self, samples: Pixels) -> Pixels:
        """Return the activations of the network's hidden layer [N, FEATURES]."""
        return np.maximum(samples @ self._network.coefs_[0] + self._network.intercepts_[0], 0)


@functools.cache
def digit_metrics() -> DigitMetrics:
    """Return the metrics; their classifier and network are trained once per process."""
    return DigitMetrics()


def class_means(x: Tensor, y: Tensor, labels: Tensor) -> Tensor:
    """Return the mean image of each label's class, of images x with labels y: accurate and without variety."""
    return torch.stack([x[y == k].mean(0) for k in range(int(y.max()) + 1)])[labels]


def accepted(metrics: dict[str, float]) -> bool:
    """Return whether metrics reach ACCEPTED."""
    return (
        metrics["accuracy"] >= ACCEPTED["accuracy"]
        and metrics["frechet"] <= ACCEPTED["frechet"]
        and metrics["recall"] >= ACCEPTED["recall"]
    )
