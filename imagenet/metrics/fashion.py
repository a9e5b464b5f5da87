"""The metrics of generated clothes, by a small network that is trained on the real ones; never to be called FID.

    accuracy           fraction of samples to which the network gives their label
    frechet            Frechet distance to the pictures to learn from, in the network's 64 features
    frechet_held_out   the same of held-out pictures: no lower bound, as a model has seen the others
    precision, recall  fraction of samples within reach of real pictures, and of real pictures within reach of samples
                       (Kynkaanniemi et al. 2019, k = 3), in the same features

Samples have the labels of the first COUNT held-out pictures.
"""

import functools
from pathlib import Path

import torch
from torch import Tensor, nn

from imagenet.data.fashion import load_fashion
from imagenet.metrics.frechet import frechet_distance, gaussian_statistics, precision_recall

COUNT = 2000  # samples, and pictures of either kind in precision and recall
FEATURES = 64
EPOCHS = 5


class FashionMetrics:
    """The metrics, with the network and statistics of the real pictures.

    Attributes:
        labels: [COUNT], of held-out pictures; samples have the same.
        accuracy: of the network, on all held-out pictures.
        held_out: the Frechet distance of COUNT held-out pictures.
    """

    def __init__(self, folder: str | Path):
        (x_train, y_train), (x_test, y_test) = load_fashion(folder)
        self._network = train_classifier(x_train, y_train)
        test, self.labels = x_test[:COUNT] / 127.5 - 1, y_test[:COUNT]
        self.accuracy = float((self._predict(x_test / 127.5 - 1)[1] == y_test).float().mean())
        self._train = self._predict(x_train / 127.5 - 1)[0]
        self._real = gaussian_statistics(self._train)
        self.held_out = self._frechet(self._predict(test)[0])

    def measure(self, x: Tensor) -> dict[str, float]:
        """Measure samples x [COUNT, 1, 28, 28] in [-1, 1] that were generated for the labels `self.labels`."""
        features, predicted = self._predict(x.float().cpu().clamp(-1, 1))
        precision, recall = precision_recall(self._train[: len(x)], features)
        metrics = {
            "accuracy": float((predicted == self.labels).float().mean()),
            "frechet": self._frechet(features),
            "frechet_held_out": self.held_out,
            "precision": precision,
            "recall": recall,
        }
        return {name: round(value, 4) for name, value in metrics.items()}

    def _frechet(self, features: Tensor) -> float:
        """Return the Frechet distance of features to those of the pictures to learn from."""
        return frechet_distance(*self._real, *gaussian_statistics(features))

    @torch.no_grad()
    def _predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the features [N, FEATURES] and the classes [N] of pictures in [-1, 1]."""
        features = torch.cat([self._network[:-1](part) for part in x.split(1000)])
        return features, self._network[-1](features).argmax(1)


def train_classifier(x: Tensor, y: Tensor) -> nn.Sequential:
    """Train two convolutions and two layers on pictures, uint8 [N, 1, 28, 28], and labels [N]; the same each time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(1, 32, 4, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 4, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 7 * 7, FEATURES), nn.ReLU(), nn.Linear(FEATURES, 10),
        )  # fmt: skip
        batches = [part for _ in range(EPOCHS) for part in torch.randperm(len(x)).split(128)]
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for part in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[part] / 127.5 - 1), y[part]).backward()
        optimizer.step()
        decay.step()
    return network.eval()


@functools.cache
def fashion_metrics(folder: str | Path) -> FashionMetrics:
    """Return the metrics; their network is trained once per process, in half a minute on a CPU."""
    return FashionMetrics(folder)
