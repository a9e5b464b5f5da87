"""Results and their memory: outputs and gradients lie as [B, N, H, D], so that joining the heads needs no copy."""

from typing import NamedTuple

import torch
from torch import Tensor

from jvp_attention.shapes import Given


class Results(NamedTuple):
    """Results of the forward, and what the backward needs from it; without tangents all but o and lse are `nothing`."""

    o: Tensor  # [B, H, N, D]
    do: Tensor  # [B, H, N, D]
    o_residual: Tensor  # o before rounding to 16 bits, less o; nothing in float32 or where no gradient is wanted
    do_residual: Tensor
    lse: Tensor  # [B, H, N], base 2 from the kernels, natural from PyTorch's attention
    mu: Tensor  # [B, H, N]; nothing unless q or k has a tangent

    @classmethod
    def plain(cls, o: Tensor, lse: Tensor) -> "Results":
        """Make the results of ordinary attention."""
        return cls(o, nothing(o), nothing(o), nothing(o), lse, nothing(lse))


def empty_rows(like: Tensor) -> Tensor:
    """Make an empty tensor of the shape of `like` [B, H, rows, D] that lies in memory as [B, rows, H, D]."""
    return torch.empty_strided(like.shape, row_strides(like), dtype=like.dtype, device=like.device)


def row_strides(like: Tensor) -> tuple[int, ...]:
    """Return the strides of a tensor of the shape of `like` that lies in memory as [B, rows, H, D]."""
    _, heads, rows, channels = like.shape
    return rows * heads * channels, channels, heads * channels, 1


def empty_results(given: Given, keep: bool) -> Results:
    """Allocate the results of the forward, with the residuals, in 16 bits, if `keep` asks for them."""
    q, dual = given.q, given.has_tangent
    lse = empty_numbers(q)

    def rows(wanted: bool) -> Tensor:
        return empty_rows(q) if wanted else nothing(q)

    residuals = dual and keep and q.dtype.itemsize < 4
    mu = empty_numbers(q) if given.logits_have_tangent else nothing(lse)
    return Results(rows(True), rows(dual), rows(residuals), rows(residuals), lse, mu)


def as_rows(x: Tensor) -> Tensor:
    """Return x [B, H, rows, D] in the memory order of `empty_rows`, x itself if it is; placeholders are unchanged."""
    return x if x.ndim != 4 or x.stride() == row_strides(x) else empty_rows(x).copy_(x)


def empty_numbers(like: Tensor) -> Tensor:
    """Make an empty number per row of `like` [B, H, rows, D], float32 at least: [B, H, rows]."""
    return torch.empty(like.shape[:3], dtype=number_type(like), device=like.device)


def nothing(like: Tensor) -> Tensor:
    """Make the placeholder of a result that is not wanted: a tensor without elements, the only one with one axis."""
    return like.new_empty(0)


def number_type(like: Tensor) -> torch.dtype:
    """Return the dtype that sums and statistics of rows have: float32, or float64 for float64."""
    return torch.promote_types(like.dtype, torch.float32)


def rows_in_order(x: Tensor) -> Tensor:
    """Return x itself if its channels lie side by side, else such a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def zero_rows(like: Tensor) -> Tensor:
    """Make zeros of the shape of `like` [B, H, rows, D] that take the memory of one row."""
    return like.new_zeros(1, 1, 1, like.shape[-1]).expand(like.shape)
