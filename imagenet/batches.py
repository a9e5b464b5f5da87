"""The batch of every step as a pure function of (seed, step), whatever the number of processes.

Each epoch visits the samples in a new order, decided by (seed, epoch). Noise, times and dropped labels are drawn in
blocks of BLOCK samples decided by (seed, step, block), so that any process can draw any block alone.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.image_datasets import Data
from imagenet.noise import PERMUTATION, STEP
from imagenet.presets import Config
from tvm_ref import Condition, Times, draw_beta, drop_labels
from tvm_ref.interruption import SAVE_SIGNALS

BLOCK = 32  # samples whose noise and times are drawn at once


class Batch(NamedTuple):
    """A batch, or a micro-batch: data x0, noise x1, times and condition; tensors [B, ...]."""

    x0: Tensor
    x1: Tensor
    times: Times
    condition: Condition

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        return self._map(lambda a: a.to(device, non_blocking=True))

    def slice(self, start: int, stop: int) -> "Batch":
        """Return samples start to stop - 1."""
        return self._map(lambda a: a[start:stop])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        """Apply `change` to every tensor."""
        times, condition = Times(*map(change, self.times)), Condition(*map(change, self.condition))
        return Batch(change(self.x0), change(self.x1), times, condition)


def concatenate(parts: Sequence[Batch]) -> Batch:
    """Concatenate batches."""
    return Batch(
        torch.cat([part.x0 for part in parts]),
        torch.cat([part.x1 for part in parts]),
        Times(*(torch.cat(a) for a in zip(*(part.times for part in parts), strict=True))),
        Condition(*(torch.cat(a) for a in zip(*(part.condition for part in parts), strict=True))),
    )


class Batches:
    """The batches of a run: batches[step] is this process's part of the batch of a step, in order of rank.

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
        blocks = concatenate([self._block(step, block) for block in range(first, last)])
        return blocks.slice(self.start - first * BLOCK, self.stop - first * BLOCK)

    def _block(self, step: int, block: int) -> Batch:
        """Draw samples block * BLOCK to (block + 1) * BLOCK - 1 of a step, fewer at its end."""
        config = self.config
        start, stop = block * BLOCK, min((block + 1) * BLOCK, config.batch_size)
        x0, label = self._samples(step * config.batch_size + start, step * config.batch_size + stop)
        key = np.random.SeedSequence([STEP, config.seed, step, block]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(key) % 2**63)
        n = len(x0)
        x1 = torch.randn(x0.shape, generator=generator)
        times = config.sampler().draw(n, generator)
        condition = Condition(label, draw_beta(n, config.w, config.w_max or config.w, generator=generator))
        return Batch(x0, x1, times, drop_labels(condition, config.classes, config.label_dropout, generator=generator))

    def _samples(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return samples number start to stop - 1 of the run, counted over its epochs."""
        parts = []
        while start < stop:
            epoch, place = divmod(start, len(self.data))
            end = min(stop, (epoch + 1) * len(self.data))
            parts.append(self.data.batch(self._permutation(epoch)[place : place + end - start].tolist(), epoch))
            start = end
        x, labels = zip(*parts, strict=True)
        return torch.cat(x), torch.cat(labels)

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        """Return the order in which an epoch visits the samples."""
        if self._order[0] != epoch:
            generator = np.random.default_rng((PERMUTATION, self.config.seed, epoch))
            self._order = epoch, generator.permutation(len(self.data))
        return self._order[1]


def loader(batches: Batches, start: int, workers: int, *, pin: bool = False) -> Iterator[Batch]:
    """Iterate over the batches of steps start, start + 1, ..., read ahead by `workers` processes (0: by none)."""
    if not workers:
        return (batches[step] for step in range(start, len(batches)))
    steps: Any = torch.utils.data.Subset(batches, range(start, len(batches)))  # type: ignore[arg-type]
    return iter(
        torch.utils.data.DataLoader(
            steps, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=_ignore_signals
        )
    )


def _ignore_signals(_: int) -> None:
    """Leave Ctrl-C, torchrun's SIGTERM and SIGUSR1, which reach every process of a group, to the trainer."""
    for number in (signal.SIGINT, signal.SIGTERM, *SAVE_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
