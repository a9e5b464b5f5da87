"""Memory of results: outputs and gradients lie as [B, N, H, D], so that joining the heads needs no copy."""

import torch
from torch import Tensor


def empty_rows(like: Tensor) -> Tensor:
    """Make an empty tensor of the shape of `like` [B, H, rows, D] that lies in memory as [B, rows, H, D]."""
    _, heads, rows, channels = like.shape
    strides = (rows * heads * channels, channels, heads * channels, 1)
    return torch.empty_strided(like.shape, strides, dtype=like.dtype, device=like.device)


def as_rows(x: Tensor) -> Tensor:
    """Return x [B, H, rows, D] in the memory order of `empty_rows`."""
    return empty_rows(x).copy_(x)


def empty_low(like: Tensor) -> Tensor:
    """Make room for what 16-bit rows lose in rounding; nothing for float32."""
    return empty_rows(like) if like.dtype.itemsize < 4 else nothing(like)


def nothing(like: Tensor) -> Tensor:
    """Make the placeholder of a result that is not wanted: a tensor without elements, the only one with one axis."""
    return like.new_empty(0)


def empty_numbers(like: Tensor) -> Tensor:
    """Make an empty float32 per row of `like` [B, H, rows, D]: [B, H, rows]."""
    return torch.empty(like.shape[:3], dtype=torch.float32, device=like.device)


def rows_in_order(x: Tensor) -> Tensor:
    """Return x itself if its channels lie side by side, else a copy of which that is true."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def zero_rows(like: Tensor) -> Tensor:
    """Make zeros of the shape of `like` [B, H, rows, D] that take the memory of one row."""
    return like.new_zeros(1, 1, 1, like.shape[-1]).expand(like.shape)
