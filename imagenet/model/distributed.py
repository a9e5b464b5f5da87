"""World: the processes that work together, their ranks and collectives."""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from tvm_ref.cli.errors import UserError
from tvm_ref.cli.options import require_device

CPU = torch.device("cpu")
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl"}  # numbers on the CPU travel by gloo, gradients by NCCL
TIMEOUT = timedelta(minutes=10)  # for gradients of other processes, by NCCL
PATIENCE = timedelta(hours=2)  # for everything else, such as one process downloading or writing a checkpoint
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The group of processes, seen from one of them; by default one process on the CPU."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: Any = None  # of gloo, with PATIENCE; None is the default group
    saving: Any = None  # a second group, for states that are written while training continues

    @property
    def first(self) -> bool:
        """True in rank 0, the process that writes and prints."""
        return self.rank == 0

    def all_gather(self, values: list[float]) -> Tensor:
        """Gather a row of numbers from every process: [size, len(values)], float64, on the CPU."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row, group=self.group)
        return torch.stack(rows)

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set in any process."""
        found: list[bool] = (self.all_gather([float(flag) for flag in flags]) > 0).any(0).tolist()
        return found

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.all_gather([0.0])

    def partition(self, n: int) -> range:
        """Return this process's part of 0 to n - 1: contiguous; sizes differ by at most one."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def broadcast(self, value: Any) -> Any:
        """Broadcast an object from rank 0."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raise rank 0's error, if there is one, in every process, so that none is left waiting.

        Rank 0 raises it with its traceback. The others raise the same UserError or OSError, or a RuntimeError that
        quotes any other.
        """
        shared = error if error is None or isinstance(error, UserError | OSError) else f"on rank 0: {error!r}"
        shared = self.broadcast(shared)
        if error is not None:
            raise error
        if shared is not None:
            raise shared if isinstance(shared, Exception) else RuntimeError(shared)

    def on_first(self, task: Callable[[], T]) -> T | None:
        """Run a task on rank 0 only while the others wait; returns its result there, and None elsewhere.

        Raises:
            Exception: in every process, if the task raised one; see raise_on_all_ranks.
        """
        result, error = None, None
        if self.first:
            try:
                result = task()
            except Exception as fault:
                error = fault
        self.raise_on_all_ranks(error)
        return result


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Args:
        device: a device; "cuda" is this process's GPU, and None is that, or the CPU where there is none.

    Raises:
        ValueError: a device that cannot be used here.
    """
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    here = require_device(f"cuda:{local}" if name == "cuda" else name)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    group = saving = None
    try:
        if size > 1:
            distributed.init_process_group(BACKENDS.get(here.type, "gloo"), timeout=TIMEOUT)
            group, saving = (distributed.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        yield World(rank, size, here, group, saving)
    finally:
        if distributed.is_initialized():  # FSDP initialises it also in a single process
            distributed.destroy_process_group()
