"""The metrics of generated pictures, against those of the folder that the model learned.

A picture counts as the means of its pixels over a grid of at most SIDE x SIDE, in [0, 1]: what is compared is layout
and colour, not texture. No network is needed, and none of these numbers is comparable to a FID.

    frechet            Frechet distance to the pictures to learn from
    frechet_held_out   the same of the held-out pictures, one set: no lower bound, as a model has seen the others
    precision, recall  fraction of samples within reach of real pictures, and of real pictures within reach of samples
                       (Kynkaanniemi et al. 2019, k = 3)
    brightness         mean of all pixels; that of the data is in data.json
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from imagenet.metrics.frechet import frechet_distance, gaussian_statistics, precision_recall

SIDE = 8  # of the grid of means
REAL = 5000  # pictures to learn from that are compared with, of all classes in proportion
NEIGHBOURS = 3  # k of precision and recall


def pooled(x: Tensor) -> NDArray[np.float32]:
    """Take the means of images [N, C, H, W] in [-1, 1] over a grid: [N, D], each number in [0, 1]."""
    side = min(SIDE, x.shape[-1])
    means = nn.functional.adaptive_avg_pool2d((x.float().cpu().clamp(-1, 1) + 1) / 2, side)
    return means.flatten(1).numpy()


class PictureMetrics:
    """The metrics, with statistics of the real pictures, uint8 [N, C, H, W].

    Attributes:
        labels: labels of the held-out pictures; samples have the same.
        held_out: the Frechet distance of the held-out pictures.
    """

    def __init__(self, train: Tensor, held_out: Tensor, labels: Tensor):
        chosen = torch.linspace(0, len(train) - 1, min(REAL, len(train))).round().long()
        self._train = np.concatenate([pooled(train[part] / 127.5 - 1) for part in chosen.split(256)])
        self._real, self.labels = gaussian_statistics(self._train), labels
        self.held_out = frechet_distance(*self._real, *gaussian_statistics(pooled(held_out / 127.5 - 1)))

    def measure(self, x: Tensor) -> dict[str, float]:
        """Measure samples x [N, C, H, W] that were generated for the labels `self.labels`."""
        samples = pooled(x)
        precision, recall = precision_recall(self._train, samples, NEIGHBOURS)
        metrics = {
            "frechet": frechet_distance(*self._real, *gaussian_statistics(samples)),
            "frechet_held_out": self.held_out,
            "precision": precision,
            "recall": recall,
            "brightness": float(samples.mean()),
        }
        return {name: round(value, 4) for name, value in metrics.items()}
