"""Shapes: the tensor types that signatures use, and how times meet samples."""

from typing import TypeAlias

from jaxtyping import Float, Int
from torch import Tensor

Sample: TypeAlias = Float[Tensor, "b *d"]  # points, latents or images: [B, ...]
Time: TypeAlias = Float[Tensor, " b"]  # one time per sample, from 0 (data) to 1 (noise)
PerSample: TypeAlias = Float[Tensor, " b"]  # one number per sample
Labels: TypeAlias = Int[Tensor, " b"]  # one class per sample


def over(a: Tensor, x: Tensor) -> Tensor:
    """View a: [B] as [B, 1, ..., 1], so that it broadcasts over x: [B, ...]."""
    return a.view(-1, *[1] * (x.ndim - 1))
