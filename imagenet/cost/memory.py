"""The memory of a training: its state by arithmetic, and a step, counted on the device "meta" without computing."""

import os
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagenet.config import Config, build_model
from imagenet.cost.flops import weights_of
from imagenet.model.distributed import World
from tvm_ref import EMA, Condition
from tvm_ref.seeding import generator, uniform_numbers

SMALL = 100  # trainings whose state fits into memory this many times are not checked


class _Held(TorchDispatchMode):
    """Count the bytes of storages, from the operator that makes them until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for a in tree_leaves((args, kwargs)):
            if isinstance(a, Tensor):
                self._known.add(a.untyped_storage())  # existed before, or is counted already
        for a in tree_leaves(result):
            if isinstance(a, Tensor) and (storage := a.untyped_storage()) not in self._known:
                self._known.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return result

    def _change(self, by: int) -> None:
        self.bytes += by
        self.peak = max(self.peak, self.bytes)


def peak_bytes(work: Callable[[], object]) -> int:
    """Return the peak of the bytes of tensors that some work allocates, on top of existing ones."""
    with _Held() as held:
        work()
    return held.peak


def step_bytes(config: Config, device: str = "cpu") -> int:
    """Count the peak of the loss of a batch and its backward, gradients of weights included.

    Times are the configuration's, of evenly spread numbers; attention is plain; a curriculum is at its end. On the
    device "meta" nothing is computed, and a sample whose times would make it flow matching counts as a jump.
    """
    n, shape = config.batch_size, (config.in_channels, config.input_size, config.input_size)
    x0, x1 = torch.randn(2, n, *shape, generator=generator(0)).to(device)
    times = config.sampler().from_uniform(uniform_numbers(n, 4, 0).T)
    times = type(times)(*(a.to(device) for a in times))
    with torch.device(device):
        model = build_model(config, attention="plain")
        objective, target = config.make_objective(model), EMA(model, 0.99).module
        objective.set_progress(1.0)
        condition = Condition(torch.arange(n) % config.classes, torch.full((n,), 1 / config.w))
        return peak_bytes(lambda: objective(x0, x1, times, condition, target).total.mean().backward())


def state_bytes(config: Config) -> int:
    """Sum weights, their two averages, and the optimizer's state, all float32; FSDP shards them over processes.

    AdamW keeps two moments. SOAP keeps in addition, for each matrix, two square matrices per side.
    """
    shapes = weights_of(config)
    weights = sum(shape.numel() for shape in shapes)
    squares = sum(side**2 for shape in shapes if len(shape) > 1 for side in shape)
    return 4 * (5 * weights + (2 * squares if config.optimizer == "soap" else 0))


def shortage(config: Config, world: World) -> str | None:
    """Return a warning if a training on the CPU will not fit into the memory that is free; saving needs no more."""
    import psutil  # slow to import, and --help does not need it

    free, state = psutil.virtual_memory().available, state_bytes(config)
    if world.device.type != "cpu" or SMALL * state < free:
        return None
    micro_batch = replace(config, batch_size=config.batch_size // config.accumulate // world.size, accumulate=1)
    if config.accumulate > 1:  # gradients of earlier micro-batches exist from the start
        state += 4 * sum(shape.numel() for shape in weights_of(config))
    of_process = state / (world.size if config.parallel == "fsdp" else 1) + step_bytes(micro_batch, "meta")
    need = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) * of_process
    if need < free:
        return None
    return (
        f"warning: training needs about {need / 2**30:.3g} GiB of memory, and {free / 2**30:.3g} are free here; "
        "smaller micro-batches (--accumulate) or recomputed blocks (--checkpointing) need less"
    )
