"""Processes that train together: who is who, what they tell each other, and how their gradients become one.

The objective's forward holds the JVP, and what is wrapped is the objective: a JVP over a DDP module fails, and calling
the module inside one trains without synchronising, silently.
"""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from imagenet.dit import Block
from tvm_ref import EMA, FlowMap
from tvm_ref.objectives import Objective

BACKENDS = {"cuda": "cpu:gloo,cuda:nccl"}  # numbers on the CPU travel by gloo, gradients by NCCL
T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # how long a process waits for the others, as while one writes a checkpoint


@dataclass(frozen=True)
class World:
    """A process among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def gather(self, values: list[float]) -> Tensor:
        """A row of numbers from every process: [size, len(values)], float64, on the CPU."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.size == 1:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        distributed.all_gather(rows, row)
        return torch.stack(rows)

    def wait(self) -> None:
        """Wait until every process is here."""
        self.gather([0.0])

    def share(self, n: int) -> range:
        """What of 0 to n - 1 is this process's: contiguous parts, whose sizes differ by one at most."""
        return range(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def tell(self, thing: Any) -> Any:
        """What the first process hands over, in all."""
        if self.size == 1:
            return thing
        box = [thing]
        distributed.broadcast_object_list(box, src=0)
        return box[0]

    def agree(self, error: Exception | None) -> None:
        """Raise in every process, if the first one failed, so that none is left waiting."""
        error = self.tell(error)
        if error is not None:
            raise error


def start(name: str | None) -> World:
    """Join the processes that torchrun started, if it did; else be alone.

    Args:
        name: a device; None is this process's GPU, or the CPU where there is none.

    Raises:
        ValueError: a device that cannot be used here.
    """
    rank, size, local = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    name = name or (f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if size > 1:
        distributed.init_process_group(BACKENDS.get(device.type, "gloo"), timeout=PATIENCE)
    return World(rank, size, device)


def stop() -> None:
    """Leave the other processes."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def on_first(world: World, task: Callable[[], T]) -> T | None:
    """Do something in the first process alone, while the others wait; if it fails, all fail."""
    result, error = None, None
    if world.first:
        try:
            result = task()
        except (ValueError, OSError) as fault:
            error = fault
    world.agree(error)
    return result


def check_version() -> None:
    """Raise ValueError where FSDP under a JVP is known to fail or, worse, to be wrong in silence."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 13):
        raise ValueError(f"--parallel fsdp needs PyTorch 2.13 or later, as a JVP is wrong before; this is {version}")


def wrap(objective: Objective, averages: list[EMA[FlowMap]], world: World, kind: str) -> nn.Module:
    """The objective, so that its backward gives the mean gradient of all processes (kind ddp or fsdp).

    With fsdp, the weights of the objective's model and of the averages are spread over the processes, block by block.
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
            fully_shard(average.module.network, reshard_after_forward=True)  # so that it is spread when updated
        fully_shard(objective)
        return objective
    if world.size == 1:
        return objective
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(objective, devices, broadcast_buffers=False, gradient_as_bucket_view=True)


def unsynchronised(wrapped: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Inside, a backward adds to this process's gradients alone: for all micro-batches but the last."""
    if isinstance(wrapped, DistributedDataParallel):
        return wrapped.no_sync()
    return _without_reduction(wrapped) if hasattr(wrapped, "set_requires_gradient_sync") else contextlib.nullcontext()


@contextlib.contextmanager
def _without_reduction(wrapped: Any) -> Any:
    wrapped.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        wrapped.set_requires_gradient_sync(True)


def whole(state: Any) -> Any:
    """A state with every tensor whole and on the CPU. All processes take part."""
    if isinstance(state, Mapping):
        return {key: whole(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value) for value in state]
    if isinstance(state, DTensor):
        state = state.full_tensor()
    return state.detach().cpu() if isinstance(state, Tensor) else state


def spread(state: Any, like: Any) -> Any:
    """Whole tensors as the state `like` holds them: spread over the same processes, on the same devices."""
    if isinstance(state, Mapping):
        return {key: spread(value, like.get(key)) for key, value in state.items()}
    if isinstance(like, DTensor):
        return distribute_tensor(state.to(like.device), like.device_mesh, like.placements)
    return state


def spread_optimizer(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state of whole tensors, each spread as its parameter is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        index: {
            name: spread(a.clone(), parameters[index]) if isinstance(a, Tensor) and a.ndim else a
            for name, a in entry.items()
        }
        for index, entry in state["state"].items()
    }
    return state | {"state": tensors}
