"""Processes that share work which needs no gradients: encoding and sampling, alone or under torchrun."""

import os
from datetime import timedelta
from typing import NamedTuple

import torch
from torch import distributed

PATIENCE = timedelta(days=2)  # how long a rank that is done waits for the slowest


class Ranks(NamedTuple):
    """Which process this is, and of how many."""

    rank: int
    world: int
    local: int  # its place on its machine, which is its GPU's number

    def share(self, n: int) -> range:
        """What of 0 to n - 1 is this rank's: contiguous parts, whose sizes differ by one at most."""
        return range(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def device(self, name: str | None = None) -> torch.device:
        """The device called `name`, or this rank's GPU, or the CPU where there is none.

        Raises:
            ValueError: a device that cannot be used here.
        """
        name = name or (f"cuda:{self.local}" if torch.cuda.is_available() else "cpu")
        try:
            torch.zeros(1, device=name).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
        return torch.device(name)

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            distributed.barrier()


def start() -> Ranks:
    """Join the other processes that torchrun started, if any. They only meet at barriers, so gloo serves GPUs too."""
    rank, world, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if world > 1 and not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)
    return Ranks(rank, world, local)


def stop() -> None:
    """Leave the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
