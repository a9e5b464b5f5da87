"""DDP and FSDP around the objective, and gathering and sharding of states.

The objective's forward holds the JVP, and what is wrapped is the objective: a JVP over a DDP module fails, and calling
the module inside one trains without synchronising, silently.
"""

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from imagenet.model.distributed import BACKENDS, World
from imagenet.model.dit import Block
from tvm_ref import EMA, FlowMap
from tvm_ref.cli.errors import require
from tvm_ref.objectives import Objective


def check_version() -> None:
    """Raise ValueError where FSDP under a JVP is known to fail or, worse, to be silently wrong."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    right = version >= (2, 13)
    require(right, f"parallel fsdp needs PyTorch 2.13 or later, as a JVP is wrong before; this is {version}")


def wrap(objective: Objective, averages: list[EMA[FlowMap]], world: World, kind: str) -> nn.Module:
    """Wrap the objective so that its backward gives the mean gradient of all processes (kind ddp or fsdp).

    With fsdp, the weights of the objective's model and of the averages are sharded over the processes, block by block.
    """
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        if not distributed.is_initialized():  # one process; FSDP needs a group anyway
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
    # the only buffers are embeddings of positions, which are the same everywhere; PyTorch 2.14 has renamed the option
    names = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "gradient_as_bucket_view": True}
    return DistributedDataParallel(objective, devices, **options)


@contextlib.contextmanager
def no_sync(wrapped: Any) -> Iterator[None]:
    """Let a backward add only to this process's gradients: for all micro-batches but the last."""
    if isinstance(wrapped, DistributedDataParallel):
        with wrapped.no_sync():
            yield
        return
    synchronise = getattr(wrapped, "set_requires_gradient_sync", lambda _: None)  # FSDP's
    synchronise(False)
    yield
    synchronise(True)  # after an error nothing is trained further


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
