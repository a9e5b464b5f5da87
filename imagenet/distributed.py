"""Processes that train together: their ranks, their collectives, and how their gradients are averaged.

The objective's forward holds the JVP, and what is wrapped is the objective: a JVP over a DDP module fails, and calling
the module inside one trains without synchronising, silently.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from imagenet.model.dit import Block
from tvm_ref import EMA, FlowMap
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.options import require_device
from tvm_ref.objectives import Objective

CPU = torch.device("cpu")
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl"}  # numbers on the CPU travel by gloo, gradients by NCCL
TIMEOUT = timedelta(minutes=10)  # how long gradients wait for those of another process, by NCCL
PATIENCE = timedelta(hours=2)  # how long all else waits, as while one process downloads or writes a checkpoint
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes that train together, seen from one of them; alone on the CPU by default."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    group: Any = None  # of gloo, with PATIENCE; None is the default group
    saving: Any = None  # another one, for states that are written while training goes on

    @property
    def first(self) -> bool:
        """Whether this is rank 0, the process that writes and prints."""
        return self.rank == 0

    def all_gather(self, values: list[float]) -> Tensor:
        """Gather a row of numbers from every process: [size, len(values)], float64, on the CPU."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row, group=self.group)
        return torch.stack(rows)

    def sum(self, a: Tensor) -> Tensor:
        """Sum a tensor on the CPU over all processes, in place."""
        if self.size > 1:
            distributed.all_reduce(a, group=self.group)
        return a

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.all_gather([0.0])

    def partition(self, n: int) -> range:
        """Return this process's part of 0 to n - 1: contiguous, and as large as the others' but for one."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def broadcast(self, value: Any) -> Any:
        """Broadcast an object from rank 0."""
        if self.size == 1:
            return value
        box = [value]
        distributed.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def raise_on_all_ranks(self, error: Exception | None) -> None:
        """Raise rank 0's error, if there is one, in every process, so that none is left waiting."""
        error = self.broadcast(error)
        if error is not None:
            raise error

    def on_first(self, task: Callable[[], T]) -> T | None:
        """Run a task on rank 0 alone while the others wait; returns its result there, and None elsewhere.

        Raises:
            ValueError, OSError: in every process, if the task raised it.
        """
        result, error = None, None
        if self.first:
            try:
                result = task()
            except (ValueError, OSError) as fault:
                error = fault
        self.raise_on_all_ranks(error)
        return result


@contextlib.contextmanager
def process_group(device: str | None = None) -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end.

    Args:
        device: a device; None is this process's GPU, or the CPU where there is none.

    Raises:
        ValueError: a device that cannot be used here.
    """
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = device or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    here = require_device(name)
    if here.type == "cuda":
        torch.cuda.set_device(here)
    group = saving = None
    try:
        if size > 1:
            distributed.init_process_group(BACKENDS.get(here.type, "gloo"), timeout=TIMEOUT)
            group, saving = (distributed.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        yield World(rank, size, here, group, saving)
    finally:
        if distributed.is_initialized():  # also by FSDP, alone
            distributed.destroy_process_group()


def check_version() -> None:
    """Raise ValueError where FSDP under a JVP is known to fail or, worse, to be wrong in silence."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 13):
        raise UserError(f"--parallel fsdp needs PyTorch 2.13 or later, as a JVP is wrong before; this is {version}")


def wrap(objective: Objective, averages: list[EMA[FlowMap]], world: World, kind: str) -> nn.Module:
    """Wrap the objective so that its backward gives the mean gradient of all processes (kind ddp or fsdp).

    With fsdp, the weights of the objective's model and of the averages are sharded over the processes, block by block.
    """
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        if not distributed.is_initialized():  # alone; FSDP wants a group all the same
            backend = BACKENDS.get(world.device.type, "gloo")
            distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
        for block in (m for module in (objective, *(a.module for a in averages)) for m in module.modules()):
            if isinstance(block, Block):
                fully_shard(block)
        for average in averages:
            fully_shard(average.module.network, reshard_after_forward=True)  # so that it is sharded when updated
        fully_shard(objective)
        return objective
    if world.size == 1:
        return objective
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def no_sync(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Let a backward add to this process's gradients alone: for all micro-batches but the last."""
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    return _without_reduction(wrapped) if hasattr(wrapped, "set_requires_gradient_sync") else contextlib.nullcontext()


@contextlib.contextmanager
def _without_reduction(wrapped: Any) -> Any:
    """FSDP's no_sync."""
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def full_state(state: Any) -> Any:
    """Gather every tensor of a state, unsharded, on the CPU. All processes take part."""
    if isinstance(state, Mapping):
        return {key: full_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [full_state(value) for value in state]
    return full_tensor(state).detach().cpu() if isinstance(state, Tensor) else state


def full_tensor(a: Tensor) -> Tensor:
    """Gather a tensor, if FSDP has sharded it. All processes take part."""
    return a.full_tensor() if hasattr(a, "full_tensor") else a  # a DTensor, whose import takes half a second


def reshard(state: Any, like: Any) -> Any:
    """Shard full tensors as the state `like` holds them: over the same processes, on the same devices."""
    if isinstance(state, Mapping):
        return {key: reshard(value, like.get(key)) for key, value in state.items()}
    if hasattr(like, "full_tensor") and not hasattr(state, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)
    return state


def reshard_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Shard an optimizer's state of full tensors, each as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        index: {
            name: reshard(a, parameters[index]) if isinstance(a, Tensor) and a.ndim else a for name, a in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return state | {"state": tensors}
