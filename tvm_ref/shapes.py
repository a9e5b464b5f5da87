"""Shapes: the tensor types that signatures use, and the checks at the boundary of the library."""

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Sample: TypeAlias = Float[Tensor, "b *d"]  # points, latents or images: [B, ...]
Time: TypeAlias = Float[Tensor, " b"]  # one time per sample, from 0 (data) to 1 (noise)
PerSample: TypeAlias = Float[Tensor, " b"]  # one number per sample
Labels: TypeAlias = Int[Tensor, " b"]  # one class per sample


def over(a: Tensor, x: Tensor) -> Tensor:
    """View a: [B] as [B, 1, ..., 1], so that it broadcasts over x: [B, ...]."""
    return a.view(-1, *[1] * (x.ndim - 1))


def check_batch(x: Tensor, *per_sample: Tensor) -> None:
    """Raise ValueError unless x is [B, ...] and every other tensor is [B], TypeError where there is no tensor."""
    if x.ndim < 2:
        raise ValueError(f"x must be of shape [B, ...] with at least two axes, got {list(x.shape)}")
    for a in per_sample:
        if not isinstance(a, Tensor):
            raise TypeError(f"times, labels and beta must be tensors, one number per sample; got {type(a).__name__}")
        if a.shape != x.shape[:1]:
            raise ValueError(f"times, labels and beta must be of shape [{len(x)}] to go with x, got {list(a.shape)}")


def values_are_cheap(a: Tensor) -> bool:
    """Tell whether values may be looked at: an accelerator's queue would stall, torch.compile's graph would break.

    A subclass of Tensor may have none, as PyTorch's fake tensors.
    """
    return not torch.compiler.is_compiling() and a.device.type == "cpu" and type(a) in (Tensor, torch.nn.Parameter)


def check_times(t: Tensor, s: Tensor | None = None) -> None:
    """Raise ValueError unless 0 <= s <= t <= 1 everywhere; NaN is refused too.

    Values are looked at where that is cheap.
    """
    if not values_are_cheap(t):
        return
    s = t if s is None else s
    if bool(((s >= 0) & (s <= t) & (t <= 1)).all()):
        return
    if bool(((s >= 0) & (t <= 1)).all()):
        raise ValueError("the end time s must not exceed the start time t: a flow map runs from noise to data")
    raise ValueError("times must lie in [0, 1] (0 is data, 1 is noise)")
