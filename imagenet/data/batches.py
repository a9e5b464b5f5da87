"""The batch of every step as a pure function of (seed, step), whatever the number of processes.

Each epoch visits the samples in a new order, decided by (seed, epoch). Noise, times and dropped labels are drawn in
blocks of BLOCK samples decided by (seed, step, block), so that any process can draw any block. Noise and times of
small images are quasi-random: points of one sequence for SPAN steps, decided by (seed, span), with the distribution
of independent numbers but without their clumps and gaps, which halves the variance of the gradient.
"""

import math
import signal
from collections.abc import Generator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_map

from imagenet.config import LABEL_DROPOUT, Config
from imagenet.data.image_sets import Data
from imagenet.data.noise import EVEN, PERMUTATION, STEP
from tvm_ref import Condition, Times, draw_beta, drop_labels
from tvm_ref.cli.stopping import SAVE_SIGNALS
from tvm_ref.seeding import generator as generator_of
from tvm_ref.seeding import uniform_numbers

BLOCK = 32  # samples whose noise and times are drawn at once
SPAN = 32  # steps whose quasi-random numbers are drawn at once
SMALL = 64  # largest image (in numbers) that uses them: points fill few dimensions evenly, not thousands


class Batch(NamedTuple):
    """A batch, or a micro-batch: data x0, noise x1, times and condition; tensors [B, ...]."""

    x0: Tensor
    x1: Tensor
    times: Times
    condition: Condition

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device."""
        batch: Batch = tree_map(lambda a: a.to(device, non_blocking=True), self)
        return batch

    def slice(self, start: int, stop: int) -> "Batch":
        """Return samples start to stop - 1."""
        batch: Batch = tree_map(lambda a: a[start:stop], self)
        return batch


class Batches:
    """The batches of a run: batches[step] is this process's part of the batch of a step, in order of rank.

    Samples are visited in the order of a new permutation per epoch, without a gap between epochs.

    Args:
        config: batch size, seed, times, guidance.
        data: the samples.
        rank: this process.
        world: number of processes; divides the batch size.
    """

    def __init__(self, config: Config, data: Data, rank: int = 0, world: int = 1):
        self.config, self.data = config, data
        self.start = config.batch_size * rank // world
        self.stop = config.batch_size * (rank + 1) // world
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))
        self._numbers: tuple[int, Tensor] = (-1, torch.empty(0))

    def __len__(self) -> int:
        return self.config.steps

    def __getitem__(self, step: int) -> Batch:
        # whole blocks are drawn, so that numbers do not depend on how many processes share the batch
        first, last = self.start // BLOCK, -(-self.stop // BLOCK)
        blocks = [self._block(step, block) for block in range(first, last)]
        batch: Batch = tree_map(lambda *parts: torch.cat(parts), *blocks)
        return batch.slice(self.start - first * BLOCK, self.stop - first * BLOCK)

    def _block(self, step: int, block: int) -> Batch:
        """Draw samples block * BLOCK to (block + 1) * BLOCK - 1 of a step, fewer at its end."""
        config = self.config
        start, stop = block * BLOCK, min((block + 1) * BLOCK, config.batch_size)
        x0, label = self._samples(step * config.batch_size + start, step * config.batch_size + stop)
        generator, n = generator_of(STEP, config.seed, step, block), len(x0)
        if x0[0].numel() <= SMALL:
            # columns 0 to 3 give the times t, s, s'; the others, through the inverse of N(0, 1), the noise x1
            u = self._uniform_numbers(step)[start:stop]
            x1, times = torch.special.ndtri(u[:, 4:]).float().view_as(x0), config.sampler().from_uniform(u[:, :4].T)
        else:
            x1 = torch.randn(x0.shape, generator=generator)
            times = config.sampler().draw(n, generator)
        # beta = 1/w is uniform between 1/w_max and 1/w (appendix F.1); a dropped label has beta = 1 (sec. 3)
        condition = Condition(label, draw_beta(n, config.w, config.w_max or config.w, generator=generator))
        return Batch(x0, x1, times, drop_labels(condition, config.classes, LABEL_DROPOUT, generator=generator))

    def _uniform_numbers(self, step: int) -> Tensor:
        """Draw the quasi-random numbers of a step [batch size, 4 + D], for times and an image's noise of D numbers."""
        size = self.config.batch_size
        span, index = divmod(step, SPAN)
        if self._numbers[0] != span:
            columns = 4 + math.prod(self.data.shape)
            self._numbers = span, uniform_numbers(SPAN * size, columns, EVEN, self.config.seed, span)
        return self._numbers[1][index * size : (index + 1) * size]

    def _samples(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return samples number start to stop - 1 of the run, counted over its epochs."""
        parts = []
        while start < stop:  # a batch may end an epoch and start the next one
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


def loader(batches: Batches, start: int, workers: int, *, pin: bool = False) -> Generator[Batch, None, None]:
    """Iterate over the batches of steps start, start + 1, ..., read ahead by `workers` processes (0: by none).

    Close it when it is not used to its end: Python waits for workers when it exits, and they ignore its SIGTERM.
    """
    if not workers:
        yield from (batches[step] for step in range(start, len(batches)))
        return
    steps: Any = torch.utils.data.Subset(batches, range(start, len(batches)))  # type: ignore[arg-type]
    yield from torch.utils.data.DataLoader(
        steps, batch_size=None, num_workers=workers, pin_memory=pin, worker_init_fn=_ignore_signals
    )


def _ignore_signals(_: int) -> None:
    """Ignore Ctrl-C, torchrun's SIGTERM and SIGUSR1, which reach every process of a group: the trainer handles them."""
    for number in (signal.SIGINT, signal.SIGTERM, *SAVE_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
