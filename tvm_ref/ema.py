"""Exponential moving averages of weights: the target theta* and the evaluation weights theta** (algorithm 1)."""

import copy
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from tvm_ref.checks import register_average, require

M = TypeVar("M", bound=nn.Module)


class EMA(Generic[M]):
    """A frozen copy of a module that follows its weights: theta_ema <- d theta_ema + (1 - d) theta.

    In the first updates d is at most (1 + n) / (10 + n), n the number of updates, so that the average forgets the
    initial weights.

    Args:
        module: the module to follow; its copy is `self.module`, without gradients.
        decay: d in [0, 1]. 0 is the module itself with stopped gradients.

    Raises:
        ValueError: a decay outside [0, 1].
    """

    def __init__(self, module: M, decay: float):
        require(0 <= decay <= 1, f"the EMA decay must lie in [0, 1], got {decay}")
        self.module: M = copy.deepcopy(module).requires_grad_(False)
        self.decay = decay
        self.updates = 0
        register_average(self)

    def __getattr__(self, name: str) -> Any:
        """Raise an AttributeError that says where to find attributes of the model."""
        raise AttributeError(f"an EMA has no {name!r}; the averaged model is its .module: pass ema.module")

    @torch.no_grad()
    def update(self, module: M) -> None:
        """Move the average towards the weights of `module`; buffers are copied."""
        # a young average would hold mostly initial weights, so its memory grows with its age
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages: list[Tensor] = list(self.module.parameters())  # listed at each update, as FSDP replaces parameters
        # one fused call for all weights: a loop over them costs more than the arithmetic
        torch._foreach_lerp_(averages, list(module.parameters()), 1 - decay)
        for average, value in zip(self.module.buffers(), module.buffers(), strict=True):
            average.copy_(value)
        self.updates += 1

    def state_dict(self) -> dict[str, Any]:
        """Return weights and number of updates."""
        return {"module": self.module.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the weights and number of updates from `state_dict`."""
        self.module.load_state_dict(state["module"])
        self.updates = state["updates"]
