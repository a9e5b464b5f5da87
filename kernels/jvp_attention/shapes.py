"""Shapes of queries and keys, and the one check of them at the package's boundary."""

from typing import TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

Queries: TypeAlias = Float[Tensor, "b h n d"]  # batch, heads, queries, channels of a head
Keys: TypeAlias = Float[Tensor, "b h m d"]  # keys and values share their length
Lengths: TypeAlias = Int[Tensor, " b"]  # how many keys each batch element has

LARGEST_HEAD = 256  # channels of a head


def default_scale(q: Tensor, scale: float | None) -> float:
    """The factor of the logits: 1/sqrt(D) unless given, as in scaled_dot_product_attention."""
    return q.shape[-1] ** -0.5 if scale is None else scale


def check(
    q: Tensor, k: Tensor, v: Tensor, tangents: tuple[Tensor | None, ...] = (), lengths: Tensor | None = None
) -> None:
    """Raise unless q is [B, H, N, D] and k and v are [B, H, M, D], of one dtype and device, their tangents likewise.

    Raises:
        TypeError: dtypes that differ or are no floating point; lengths that are no int32 or int64 tensor.
        ValueError: shapes that do not fit, an empty axis, or more than LARGEST_HEAD channels per head.
    """
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "attention takes q [B, H, N, D] and k, v [B, H, M, D], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(f"attention takes no empty axis, got q {list(q.shape)} and k {list(k.shape)}")
    if q.shape[3] > LARGEST_HEAD:
        raise ValueError(f"heads have at most {LARGEST_HEAD} channels, got {q.shape[3]}")
    for x, dx in zip((q, k, v), tangents, strict=False):
        if dx is not None and dx.shape != x.shape:
            raise ValueError(f"a tangent must have its input's shape {list(x.shape)}, got {list(dx.shape)}")
    present = [q, k, v, *(dx for dx in tangents if dx is not None)]
    if len({x.dtype for x in present}) > 1 or not q.dtype.is_floating_point:
        raise TypeError(
            f"attention takes inputs of one floating-point dtype, got {', '.join(str(x.dtype) for x in present)}"
        )
    if len({x.device for x in present}) > 1:
        raise ValueError(f"attention takes inputs on one device, got {', '.join(str(x.device) for x in present)}")
    if lengths is not None:
        _check_lengths(q, lengths)


def _check_lengths(q: Tensor, lengths: Tensor) -> None:
    """Raise unless lengths is [B], of int32 or int64, on q's device. Its values are not read, to wait for no GPU."""
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int32, torch.int64):
        found = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths must be a tensor of int32 or int64, got {found}")
    if lengths.shape != q.shape[:1]:
        raise ValueError(f"lengths must have one number per batch element, {[q.shape[0]]}, got {list(lengths.shape)}")
    if lengths.device != q.device:
        raise ValueError(f"lengths must be on the inputs' device {q.device}, got {lengths.device}")
