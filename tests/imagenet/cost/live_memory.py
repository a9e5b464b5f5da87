"""Count what a step holds: of real tensors, or of tensors that have sizes alone (PyTorch's FakeTensorMode)."""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from imagenet.config import Config, build_model
from imagenet.model import dit
from tvm_ref import OBJECTIVES, Condition, FlowMap
from tvm_ref.time_samplers import Times


class Live(TorchDispatchMode):
    """Bytes of all storages that operations made and that still live, and the most that there were.

    Args:
        known: tensors that do not count.
    """

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[int, object] = {a.untyped_storage()._cdata: None for a in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in self._living:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()

        def end(_: object) -> None:
            self.now -= size
            del self._living[key]

        self._living[key] = weakref.ref(storage, end)
        self.now += size
        self.peak = max(self.peak, self.now)


@contextlib.contextmanager
def autocast(config: Config, device: str) -> Iterator[None]:
    """As torch.autocast in bfloat16, if the configuration asks for it, also for a device that is not there."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, config.precision == "bfloat16")
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def inputs(config: Config, images: int) -> tuple[Tensor, Times, Condition]:
    x = torch.randn(images, config.in_channels, config.input_size, config.input_size)
    t = torch.linspace(0.5, 1, images)
    return x, Times(t, t / 2, t / 3), Condition(torch.zeros(images, dtype=torch.long), torch.full_like(t, 1 / config.w))


def inside(a: Tensor) -> Tensor:
    """The tensor inside of what torch.func puts around it."""
    while torch._C._functorch.is_functorch_wrapped_tensor(a):
        a = torch._C._functorch.get_unwrapped(a)
    return a


def kept(config: Config, images: int, *, tangent: bool, monkeypatch) -> int:
    """Bytes that a forward on a GPU keeps for its backward: saved tensors, and what checkpointing keeps; no weights.

    Nothing is computed, and no GPU needed: tensors have sizes alone. Each storage counts once.
    """
    found: dict[int, Tensor] = {}

    def keep(a: Tensor) -> Tensor:
        b = inside(a)
        if not b._is_zerotensor() and b.untyped_storage()._cdata not in weights:
            found[b.untyped_storage()._cdata] = b
        return a

    def checkpoint(function, *arguments, **options):
        for leaf in tree_leaves(arguments):
            if isinstance(leaf, Tensor):
                keep(leaf)
        return torch.utils.checkpoint.checkpoint(function, *arguments, **options)

    with monkeypatch.context() as patch, FakeTensorMode(), torch.device("cuda"):
        patch.setattr(dit, "checkpoint", checkpoint)
        patch.setattr("jvp_attention.operators.why_not", lambda given: "")
        model: FlowMap = build_model(config)
        weights = {a.untyped_storage()._cdata for a in model.state_dict().values()}
        x, times, condition = inputs(config, images)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda a: a), autocast(config, "cuda"):
            if tangent:
                result = model.displacement_and_terminal_velocity(x, times.t, times.s, condition)
            else:
                result = (model.velocity(x, times.t, condition),)
        total = sum(a.untyped_storage().nbytes() for a in found.values())
        del result
    return total


def peak(config: Config, images: int) -> int:
    """The most that a micro-batch's loss and backward hold on the CPU, beside weights and gradients."""
    model, target = build_model(config), build_model(config).requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    options = {"detach_jvp": True} if config.detach_jvp else {}
    objective = OBJECTIVES[config.objective](model, null_label=config.classes if config.guided else None, **options)
    x, times, condition = inputs(config, images)
    gradients = [p.grad for p in model.parameters()]
    state = [*model.state_dict().values(), *target.state_dict().values(), *gradients, x, *times, *condition]
    with Live(state) as live:
        with autocast(config, "cpu"):
            loss = objective(x, x, times, condition, target).total.mean()
        loss.backward()
    return live.peak


def target_peak(config: Config, images: int) -> int:
    """The most that the target's forward holds on the CPU, beside its weights."""
    model = build_model(config).requires_grad_(False)
    x, times, condition = inputs(config, images)
    with Live([*model.state_dict().values(), x, *times, *condition]) as live, torch.no_grad(), autocast(config, "cpu"):
        model.velocity(x, times.t, condition)
    return live.peak
