"""From tensors to kernel launches. Importing this needs triton.

Every operation allocates its results and returns them with the calls that fill them, so that the same calls can also
be compiled for a GPU that is not there.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from jvp_attention import backward, forward
from jvp_attention.layout import empty_low, empty_numbers, empty_rows, rows_in_order
from jvp_attention.tile_sizes import Tiles, candidates, channels_of_tile, is_tuning, splits_keys

Rows = tuple[Tensor, int, int, int]  # a tensor [B, H, rows, D], its strides but for the last
Tensors = tuple[Tensor, Tensor, Tensor]  # of queries, keys and values
_tuned: dict[tuple[Any, ...], Tiles] = {}


class Saved(NamedTuple):
    """What a forward left for the backward; None for what it did not."""

    o: Tensor  # [B, H, N, D]
    lse: Tensor  # [B, H, N], base 2
    do: Tensor | None = None
    o_low: Tensor | None = None  # o before rounding, less o; empty for float32
    do_low: Tensor | None = None
    mu: Tensor | None = None  # [B, H, N]


class Call(NamedTuple):
    """One launch of a kernel: its arguments but for the tiles, and the rows that its programs share out."""

    name: str  # in the tables of tile_sizes
    kernel: Any
    arguments: dict[str, Any]
    tiled: str  # QUERIES or KEYS: what a program has one tile of
    rows: int  # how many of these there are
    heads: int  # batch elements times heads

    @property
    def like(self) -> Tensor:
        """A tensor with the inputs' dtype and device."""
        return self.arguments["go" if "go" in self.arguments else "q"][0]

    def candidates(self) -> list[Tiles]:
        """The tiles to choose from; the first is the default."""
        return candidates(self.name, self.arguments["CHANNELS"], self.like.element_size())

    def launch(self, tiles: Tiles) -> None:
        """Run the kernel; its programs lie on one axis of the grid, the only one without a limit that matters."""
        sizes = {k: v for k, v in tiles.sizes().items() if k in self.kernel.arg_names}
        programs = triton.cdiv(self.rows, tiles.sizes()[self.tiled]) * self.heads
        self.kernel[(programs,)](**in_units(self.arguments), **sizes, **tiles.options())


def in_units(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with strides in units of the power of two, at most 8 channels, that divides them all.

    triton asks of an integer only whether 16 divides it, and rows of 72 channels are as well aligned for loads of 16
    bytes. Where 16 divides all strides the unit is 1.
    """
    strides = [s for x in arguments.values() if isinstance(x, tuple) for s in x[1:]]
    unit = math.gcd(16, *strides)
    unit = 1 if unit == 16 else unit
    scaled = {k: (x[0], *(s // unit for s in x[1:])) for k, x in arguments.items() if isinstance(x, tuple)}
    return arguments | scaled | {"UNIT": unit}


def run(work: tuple[list[Call], list[Tensor]]) -> list[Tensor]:
    """Launch the kernels and return the results: with default tiles, or the fastest while tuning is switched on."""
    calls, results = work
    with torch.cuda.device_of(results[0]):
        for call in calls:
            call.launch(fastest_tiles(call) if is_tuning() and call.like.is_cuda else call.candidates()[0])
    return results


def fastest_tiles(call: Call) -> Tiles:
    """The fastest candidate, timed once per kernel, options and power of two of the lengths; kept in memory."""
    a = call.arguments
    sizes = [triton.next_power_of_2(a[name]) for name in ("N", "M") if name in a]
    options = (a.get("CAUSAL"), a.get("lengths") is None)
    key = (call.name, call.like.dtype, a["D"], *options, *sizes, triton.next_power_of_2(call.heads))
    if key not in _tuned and torch.cuda.is_current_stream_capturing():
        return call.candidates()[0]
    if key not in _tuned:
        _tuned[key] = min(call.candidates(), key=lambda tiles: _milliseconds(call, tiles))
    return _tuned[key]


def _milliseconds(call: Call, tiles: Tiles) -> float:
    """Median time of one launch; infinite where the tiles need more than the GPU has."""
    try:
        return triton.testing.do_bench(lambda: call.launch(tiles), return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")


def _rows(x: Tensor | None) -> Rows | None:
    """A tensor as kernels take it; copied only if its channels do not lie side by side."""
    if x is None or x.numel() == 0:
        return None
    x = rows_in_order(x)
    return x, x.stride(0), x.stride(1), x.stride(2)


def _attention_arguments(
    primals: Tensors, tangents: Tensors | None, scale: float, causal: bool, lengths: Tensor | None
) -> dict[str, Any]:
    """The arguments that all kernels over tiles of queries and keys share; D and CHANNELS also the row sums."""
    q, k, _ = primals
    tf32 = q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return {
        **{name: _rows(x) for name, x in zip(("q", "k", "v"), primals, strict=True)},
        **{name: _rows(x) for name, x in zip(("dq", "dk", "dv"), tangents or [None] * 3, strict=True)},
        "lengths": None if lengths is None else lengths.contiguous(),
        "scale": scale,
        "heads": q.shape[1],
        "N": q.shape[2],
        "M": k.shape[2],
        "D": q.shape[3],
        "CAUSAL": causal,
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "CHANNELS": channels_of_tile(q.shape[3]),
    }


def forward_calls(
    primals: Tensors, tangents: Tensors | None, scale: float, causal: bool, lengths: Tensor | None = None
) -> tuple[list[Call], list[Tensor]]:
    """Attention of q, k, v: [o, lse]; with tangents [o, do, o_low, do_low, lse, mu], low being what rounding took."""
    q = primals[0]
    dual = tangents is not None
    o, lse = empty_rows(q), empty_numbers(q)
    do, mu = (empty_rows(q), empty_numbers(q)) if dual else (None, None)
    o_low, do_low = (empty_low(q), empty_low(q)) if dual else (None, None)
    arguments = {
        **_attention_arguments(primals, tangents, scale, causal, lengths),
        **{"o": _rows(o), "do": _rows(do), "o_low": _rows(o_low), "do_low": _rows(do_low), "lse": lse, "mu": mu},
    }
    name = "forward_dual" if dual else "forward"
    call = Call(name, forward.forward_kernel, arguments, "QUERIES", q.shape[2], q.shape[0] * q.shape[1])
    results = [o, do, o_low, do_low, lse, mu]
    return [call], [x for x in results if x is not None]


def backward_calls(
    primals: Tensors,
    tangents: Tensors | None,
    saved: Saved,
    go: Tensor,
    gdo: Tensor | None,
    scale: float,
    causal: bool,
    lengths: Tensor | None = None,
) -> tuple[list[Call], list[Tensor]]:
    """Gradients of q, k, v: [gq, gk, gv]; with tangents and gdo [gq, gk, gv, gdq, gdk, gdv]."""
    q, k, v = primals
    dual = tangents is not None
    c, r = empty_numbers(q) if dual else None, empty_numbers(q)
    gq, gk, gv = empty_rows(q), empty_rows(k), empty_rows(v)
    gdq, gdk, gdv = (empty_rows(q), empty_rows(k), empty_rows(v)) if dual else (None, None, None)
    heads = q.shape[0] * q.shape[1]
    common = {
        **_attention_arguments(primals, tangents, scale, causal, lengths),
        **{"go": _rows(go), "gdo": _rows(gdo), "lse": saved.lse, "mu": saved.mu, "c": c, "r": r},
    }
    sums = {
        **{name: common[name] for name in ("go", "gdo", "c", "r", "heads", "N", "D", "CHANNELS")},
        **{name: _rows(getattr(saved, name)) for name in ("o", "do", "o_low", "do_low")},
    }
    of_queries = common | {"gq": _rows(gq), "gdq": _rows(gdq)}
    of_keys = common | {"gk": _rows(gk), "gdk": _rows(gdk), "gv": None, "gdv": None}
    of_values = common | {"gk": None, "gdk": None, "gv": _rows(gv), "gdv": _rows(gdv)}
    key_calls = [("key_dual" if dual else "key", of_keys | {"gv": _rows(gv), "gdv": _rows(gdv)})]
    if dual and splits_keys(common["CHANNELS"], q.element_size()):
        key_calls = [("key_dual_k", of_keys), ("key_dual_v", of_values)]
    calls = [
        Call("row_sum", backward.row_sum_kernel, sums, "QUERIES", q.shape[2], heads),
        Call("query_dual" if dual else "query", backward.query_kernel, of_queries, "QUERIES", q.shape[2], heads),
        *(Call(name, backward.key_kernel, given, "KEYS", k.shape[2], heads) for name, given in key_calls),
    ]
    return calls, [x for x in (gq, gk, gv, gdq, gdk, gdv) if x is not None]
