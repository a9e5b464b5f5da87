"""The data sets, and the batch of every step as a pure function of (seed, step), whatever the number of processes.

A data set is map-style, data[index] -> (x float32 [C, H, W], label), and gives many at once: data.batch(indices, draw).
`draw` counts the epochs: what is drawn anew at each visit (flips, latents of a posterior) is decided by (seed, draw,
index).
"""

import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.presets import Config
from tvm_ref import Condition, Times, draw_beta, drop_labels

BLOCK = 32  # samples whose noise and times are drawn at once: any process can draw any block alone
PERMUTATION, FLIP, NOISE = 101, 102, 103  # what random numbers are for: no stream serves twice


class Data(Protocol):
    """What training asks of a data set.

    Attributes:
        shape: (C, H, W).
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int:
        """How many samples there are."""
        ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """A sample x [C, H, W] and its label."""
        ...

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """Samples x [B, C, H, W] and labels [B]."""
        ...


class Images:
    """Images that fit in memory.

    Args:
        x: [N, C, H, W], uint8 (0 to 255) or float in [-1, 1].
        labels: [N].
        flip: mirror half of them, drawn anew at each visit.
        seed: of the flips.
    """

    def __init__(self, x: Tensor, labels: Tensor, *, flip: bool = False, seed: int = 0):
        self.x, self.labels, self.flip, self.seed = x, labels, flip, seed
        self.shape = (x.shape[1], x.shape[2], x.shape[3])

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, labels = self.batch([index], 0)
        return x[0], int(labels[0])

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """See Data."""
        chosen = torch.as_tensor(indices)
        x, labels = self.x[chosen], self.labels[chosen]
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        if self.flip:
            flips = np.random.default_rng((FLIP, self.seed, draw)).random(len(self)) < 0.5
            x = torch.where(torch.from_numpy(flips)[chosen].view(-1, 1, 1, 1), x.flip(-1), x)
        return x, labels


class Synthetic:
    """Normal noise with labels, for throughput: as many samples as ImageNet, drawn from a small store."""

    STORE = 256

    def __init__(self, shape: tuple[int, int, int], classes: int):
        self.shape, self.classes = shape, classes
        self._x = torch.randn(self.STORE, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1_281_167

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._x[index % self.STORE], index % self.classes

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """See Data."""
        chosen = torch.as_tensor(indices)
        return self._x[chosen % self.STORE], chosen % self.classes


def load_data(config: Config, folder: str | Path | None = None, *, download: bool = False) -> Data:
    """The data of a configuration.

    Args:
        config: names the data.
        folder: where cifar10 or latents lie.
        download: fetch cifar10 into `folder` if it is not there.

    Raises:
        ValueError: no such data there, or of another shape or number of classes than the configuration says; an extra
            of the package that is not installed.
    """
    shape = (config.in_channels, config.input_size, config.input_size)
    if config.data == "synthetic":
        return Synthetic(shape, config.classes)
    data: Data
    if config.data == "digits":
        from imagenet.digits import load_digits

        x, labels = load_digits().train
        data = Images(x, labels)
    elif folder is None:
        raise ValueError(f"--data {config.data} needs --data-path, the folder that it lies in")
    elif config.data == "cifar10":
        data = Images(*_load_cifar10(folder, download), flip=True, seed=config.seed)
    else:
        from imagenet.latents import Latents

        data = Latents(folder, config.seed)
    if data.shape != shape:
        raise ValueError(f"the data are of shape {list(data.shape)}, the configuration asks for {list(shape)}")
    _check_labels(data, config.classes)
    return data


def _check_labels(data: Data, classes: int) -> None:
    labels = getattr(data, "labels", None)
    if labels is not None and len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(f"the data have labels up to {int(labels.max())}, the configuration {classes} classes")


def _load_cifar10(folder: str | Path, download: bool) -> tuple[Tensor, Tensor]:
    """Images uint8 [50000, 3, 32, 32] and labels of the training split."""
    try:
        from torchvision.datasets import CIFAR10
    except ImportError:
        raise ValueError("cifar10 needs torchvision: pip install -e '.[imagenet]'") from None
    try:
        stored = CIFAR10(str(folder), train=True, download=download)
    except (RuntimeError, OSError) as error:
        advice = "" if download else " (--download fetches it)"
        raise ValueError(f"no CIFAR-10 in {folder}: {str(error).splitlines()[0]}{advice}") from None
    return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)


# The batch of a step ------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a step, or a part of it, trains on: data x0, noise x1, times, condition; tensors [B, ...]."""

    x0: Tensor
    x1: Tensor
    times: Times
    condition: Condition

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(
            self.x0.to(device, non_blocking=True),
            self.x1.to(device, non_blocking=True),
            Times(*(a.to(device, non_blocking=True) for a in self.times)),
            Condition(*(a.to(device, non_blocking=True) for a in self.condition)),
        )

    def cut(self, start: int, stop: int) -> "Batch":
        """Samples start to stop - 1."""
        return Batch(
            self.x0[start:stop],
            self.x1[start:stop],
            Times(*(a[start:stop] for a in self.times)),
            Condition(*(a[start:stop] for a in self.condition)),
        )


def joined(parts: Sequence[Batch]) -> Batch:
    """One batch of many."""
    return Batch(
        torch.cat([part.x0 for part in parts]),
        torch.cat([part.x1 for part in parts]),
        Times(*(torch.cat(a) for a in zip(*(part.times for part in parts), strict=True))),
        Condition(*(torch.cat(a) for a in zip(*(part.condition for part in parts), strict=True))),
    )


class Batches:
    """The batches of a run: batches[step] is what this process trains on in that step.

    The batch of all processes is a pure function of (seed, step); a process takes its part of it, in order of rank.
    Samples are visited in the order of a new permutation per epoch, without a gap between epochs.

    Args:
        config: batch size, seed, times, guidance.
        data: the samples.
        rank: this process.
        world: how many there are; divides the batch size.
    """

    def __init__(self, config: Config, data: Data, rank: int = 0, world: int = 1):
        self.config, self.data = config, data
        self.start = config.batch_size * rank // world
        self.stop = config.batch_size * (rank + 1) // world
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        first, last = self.start // BLOCK, -(-self.stop // BLOCK)
        blocks = joined([self._block(step, block) for block in range(first, last)])
        return blocks.cut(self.start - first * BLOCK, self.stop - first * BLOCK)

    def _block(self, step: int, block: int) -> Batch:
        """Samples block * BLOCK to (block + 1) * BLOCK - 1 of a step, fewer at its end."""
        config = self.config
        start, stop = block * BLOCK, min((block + 1) * BLOCK, config.batch_size)
        x0, label = self._samples(step * config.batch_size + start, step * config.batch_size + stop)
        key = np.random.SeedSequence([NOISE, config.seed, step, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key) % 2**63)
        n = len(x0)
        x1 = torch.randn(x0.shape, generator=generator)
        times = config.sampler().draw(n, generator)
        condition = Condition(label, draw_beta(n, config.w, config.w_max or config.w, generator=generator))
        return Batch(x0, x1, times, drop_labels(condition, config.classes, config.label_dropout, generator=generator))

    def _samples(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Samples number start to stop - 1 of the run, counted over its epochs."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, len(self.data))
            end = min(stop, (epoch + 1) * len(self.data))
            parts.append(self.data.batch(self._permutation(epoch)[place : place + end - start].tolist(), epoch))
            start = end
        x, labels = zip(*parts, strict=True)
        return torch.cat(x), torch.cat(labels)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """The order of an epoch."""
        if self._order[0] != epoch:
            generator = np.random.default_rng((PERMUTATION, self.config.seed, epoch))
            self._order = epoch, generator.permutation(len(self.data))
        return self._order[1]


def loader(batches: Batches, start: int, workers: int, *, pin: bool = False) -> Iterator[Batch]:
    """The batches of steps start, start + 1, ..., read ahead by `workers` processes (0: by none)."""
    if not workers:
        return (batches[step] for step in range(start, len(batches)))
    steps: Any = torch.utils.data.Subset(batches, range(start, len(batches)))  # type: ignore[arg-type]
    return iter(
        torch.utils.data.DataLoader(
            steps, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=_ignore_signals
        )
    )


def _ignore_signals(_: int) -> None:
    """Ctrl-C and torchrun's SIGTERM reach every process of a group, and only the trainer answers them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
