"""From tensors to kernel launches. Importing this needs triton.

Every operation allocates its results and returns them with the calls that fill them, so that the same calls can also
be compiled for a GPU that is not present.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from jvp_attention import backward, forward
from jvp_attention.layout import Results, empty_numbers, empty_results, empty_rows, rows_in_order
from jvp_attention.rows import visible_tiles_kernel
from jvp_attention.shapes import Given
from jvp_attention.tile_sizes import (
    LARGE_KIB,
    LARGEST_TILE,
    SHORT,
    Tiles,
    candidates,
    channels_of_tile,
    is_tuning,
    splits_keys,
)

Rows = tuple[Tensor, int, int, int]  # a tensor [B, H, rows, D], its strides but for the last
Mask = tuple[Tensor, int, int, int, int]  # a mask [B or 1, H or 1, rows, columns], its strides
Work = tuple[list["Call"], Any]  # launches, and the tensors that they fill
OPTIONAL = ("lengths", "mask", "dq", "dk", "dv", "go", "gdo", "gq", "gdq", "gk", "gv", "gdk", "gdv")  # cost something
_tuned: dict[tuple[Any, ...], Tiles] = {}
_too_large: set[tuple[Any, Tiles]] = set()


class Call(NamedTuple):
    """One launch of a kernel: its arguments except the tiles, and the axis that its programs divide."""

    name: str  # in the tables of tile_sizes
    kernel: Any
    arguments: dict[str, Any]
    tiled: str  # QUERIES or KEYS: the axis of which each program takes one tile

    @property
    def like(self) -> Tensor:
        """A tensor with the inputs' dtype, device, batch and heads."""
        return self.arguments["o" if "o" in self.arguments else "q"][0]

    @property
    def heads(self) -> int:
        """Batch elements times heads, of k where programs divide the keys."""
        batch, heads = self.like.shape[:2]
        return batch * heads // (self.arguments["GROUP"] if self.tiled == "KEYS" else 1)

    def candidates(self, kib: int | None = None) -> list[Tiles]:
        """List the tiles to choose from on the inputs' device, or with so much shared memory; default first."""
        kib = shared_kib(self.like.device) if kib is None else kib
        short = max(self.arguments["N"], self.arguments.get("M", 0)) <= SHORT
        return candidates(self.name, self.arguments["CHANNELS"], self.like.element_size(), kib, short)

    def launch(self, tiles: Tiles) -> None:
        """Run the kernel; its programs lie on one axis of the grid, the only one without a limit that matters."""
        sizes = {k: v for k, v in tiles.sizes().items() if k in self.kernel.arg_names}
        programs = triton.cdiv(self.arguments["N" if self.tiled == "QUERIES" else "M"], sizes[self.tiled]) * self.heads
        arguments = in_units(self.arguments)
        if arguments.get("mask") is not None:
            arguments |= {"tiles": self.visible_tiles(tiles)}
        self.kernel[(programs,)](**arguments, **sizes, **tiles.options())

    def visible_tiles(self, tiles: Tiles) -> Rows | None:
        """List the tiles of the other side that are visible to every tile, from the mask by a kernel."""
        mask, *strides = self.arguments["mask"]
        batch, heads = (n if stride else 1 for n, stride in zip(mask.shape, strides[:2], strict=False))
        lengths, sizes = [self.arguments["N"], self.arguments["M"]], [tiles.queries, tiles.keys]
        if self.tiled == "KEYS":
            lengths, sizes = lengths[::-1], sizes[::-1]
        rows, columns = (triton.cdiv(n, size) for n, size in zip(lengths, sizes, strict=True))
        listed = _rows(torch.empty(batch, heads, rows, 1 + columns, dtype=torch.int32, device=mask.device))
        visible_tiles_kernel[(batch * heads * rows,)]((mask, *strides), listed, heads, *lengths, *sizes, num_warps=4)
        return listed


def in_units(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments with strides in units of the power of two, at most 16 channels, that divides them all.

    Triton specialises an integer only on whether 16 divides it, yet rows of 72 channels are also aligned for loads of
    16 bytes. The unit 1 tells the kernels that offsets inside a tile may need 64 bits, so it is also that of rows so
    far apart that they do.
    """
    rows = {k: x for k, x in arguments.items() if isinstance(x, tuple) and k not in ("mask", "tiles")}
    unit = math.gcd(16, *(s for x in rows.values() for s in x[1:]))
    if max(abs(x[3]) for x in rows.values()) * LARGEST_TILE >= 2**31:
        unit = 1
    scaled = {k: (x[0], *(s // unit for s in x[1:])) for k, x in rows.items()}
    return arguments | scaled | {"UNIT": unit}


def run(work: Work) -> Any:
    """Launch the kernels and return the results: with default tiles, or the fastest while tuning is switched on."""
    calls, results = work
    with torch.cuda.device_of(calls[0].like if calls else None):
        for call in calls:
            if is_tuning() and call.like.is_cuda:
                call.launch(fastest_tiles(call))
            else:
                _launch_what_fits(call)
    return results


def _launch_what_fits(call: Call) -> None:
    """Launch with the first candidate that fits the card; those that do not are not tried again for such calls."""
    several = call.candidates()
    for tiles in several:
        if _too_large and (_kind(call), tiles) in _too_large:
            continue
        try:
            return call.launch(tiles)
        except triton.runtime.errors.OutOfResources:
            if tiles == several[-1]:
                raise
            _too_large.add((_kind(call), tiles))


def _kind(call: Call) -> tuple[Any, ...]:
    """Return the key of the code that a call runs, apart from the tiles."""
    a = call.arguments
    options = tuple(name for name in OPTIONAL if a.get(name) is not None)
    return call.name, call.like.dtype, call.like.device, a["D"], a.get("CAUSAL"), a.get("PRECISION"), options


@functools.cache
def shared_kib(device: torch.device) -> int:
    """KiB of shared memory that a block may have on a card; in the interpreter as on the largest."""
    if device.type != "cuda":
        return LARGE_KIB
    properties: Any = torch.cuda.get_device_properties(device)  # whose stub lacks this field in some versions
    return properties.shared_memory_per_block_optin // 1024


def why_not(q: Tensor, dual: bool) -> str:
    """Why the kernels cannot run on the card that q is on, forward and backward, in one line; empty if they can."""
    return _why_not(q.device, q.element_size(), q.shape[-1], dual) if q.is_cuda else ""


@functools.cache
def _why_not(device: torch.device, itemsize: int, d: int, dual: bool) -> str:
    if torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    kib, channels = shared_kib(device), channels_of_tile(d)
    keys = ("key_dual_k", "key_dual_v") if splits_keys(channels, itemsize) else ("key_dual",)
    names = ("forward_dual", "query_dual", *keys) if dual else ("forward", "query", "key")
    if all(candidates(name, channels, itemsize, kib) for name in names):
        return ""
    kind = "derivatives of heads" if dual else "heads"
    return f"{kind} of {d} channels in {8 * itemsize} bits do not fit the {kib} KiB of shared memory of this GPU"


def fastest_tiles(call: Call) -> Tiles:
    """Find the fastest candidate, timed once per kernel, options and power of two of the lengths; kept in memory."""
    a = call.arguments
    sizes = [triton.next_power_of_2(a[name]) for name in ("N", "M") if name in a]
    key = (*_kind(call), *sizes, triton.next_power_of_2(call.heads))
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
    """Lay out a tensor as kernels take it; copied if channels do not lie side by side. Strides of one row are 0."""
    if x is None or x.numel() == 0:
        return None
    x = rows_in_order(x)
    (batch, heads, rows, _), (b, h, row, _) = x.shape, x.stride()  # in one go: the host does this up to 28 times a step
    return x, b if batch > 1 else 0, h if heads > 1 else 0, row if rows > 1 else 0


def _mask(mask: Tensor | None) -> Mask | None:
    """Lay out a mask [B or 1, H or 1, N, M] as kernels take it, as bytes."""
    if mask is None:
        return None
    b, h, rows, columns = (0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    return mask.view(torch.uint8), b, h, rows, columns


def _attention_arguments(given: Given) -> dict[str, Any]:
    """Gather the arguments that all kernels over tiles of queries and keys share; D and CHANNELS also the row sums."""
    if given.scale < 0:  # the kernels take |scale| for logits, and the queries negated with it
        given = given._replace(q=-given.q, dq=None if given.dq is None else -given.dq)
    q, k = given.q, given.k
    # torch.set_float32_matmul_precision, the older way, sets this too
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {
        **{name: _rows(getattr(given, name)) for name in ("q", "k", "v", "dq", "dk", "dv")},
        "lengths": None if given.lengths is None else given.lengths.contiguous(),
        "mask": _mask(given.mask),
        "tiles": None,
        "scale": given.scale,
        "heads": q.shape[1],
        "N": q.shape[2],
        "M": k.shape[2],
        "GROUP": q.shape[1] // k.shape[1],
        "D": q.shape[3],
        "CAUSAL": given.causal,
        "PRECISION": "tf32" if tf32 else "tf32x3",
        "CHANNELS": channels_of_tile(q.shape[3]),
    }


def forward_calls(given: Given, keep: bool = True) -> Work:
    """Prepare attention of q, k, v, and its tangent: `Results`, with the residuals if `keep` asks for them."""
    r = empty_results(given, keep)
    arguments = {
        **_attention_arguments(given),
        **{name: _rows(getattr(r, name)) for name in ("o", "do", "o_residual", "do_residual")},
        **{"lse": r.lse, "mu": r.mu if given.logits_have_tangent else None},
    }
    return [Call("forward_dual" if given.has_tangent else "forward", forward.forward_kernel, arguments, "QUERIES")], r


def backward_calls(
    given: Given,
    results: Results,
    go: Tensor | None,
    gdo: Tensor | None,
    wanted: Sequence[bool] = (True,) * 6,
) -> Work:
    """Prepare the gradients of q, k, v, dq, dk, dv.

    Those not wanted, and those of tangents that are None, are None. go may be None, which is zero, if gdo is given.
    """
    dual, has_t = given.has_tangent, given.logits_have_tangent
    there = (True, True, True, *(dx is not None for dx in (given.dq, given.dk, given.dv)))
    gradients = [
        empty_rows(x) if a and b else None
        for x, a, b in zip((given.q, given.k, given.v) * 2, there, wanted, strict=True)
    ]
    gq, gk, gv, gdq, gdk, gdv = gradients
    q = given.q
    sums = any(x is not None for x in (gq, gdq, gk, gdk))
    common = {
        **_attention_arguments(given),
        # under vmap they are not contiguous
        **{"lse": results.lse.contiguous(), "mu": results.mu.contiguous() if has_t else None},
        **{"go": _rows(go), "gdo": _rows(gdo)},
        **{"r": empty_numbers(q) if sums else None, "c": empty_numbers(q) if sums and has_t else None},
    }
    outputs = {name: _rows(getattr(results, name)) for name in ("o", "do", "o_residual", "do_residual")}
    outputs = outputs if dual else outputs | {"do": None, "do_residual": None}
    kind = "_dual" if dual else ""
    calls = []
    if gq is not None or gdq is not None:
        arguments = common | outputs | {"gq": _rows(gq), "gdq": _rows(gdq)}
        calls.append(Call("query" + kind, backward.query_kernel, arguments, "QUERIES"))
    elif gk is not None or gdk is not None:
        names = ("go", "gdo", "c", "r", "heads", "N", "D", "CHANNELS")
        arguments = {name: common[name] for name in names} | outputs
        calls.append(Call("row_sum", backward.row_sum_kernel, arguments, "QUERIES"))
    of_keys = {"gk": _rows(gk), "gdk": _rows(gdk), "gv": _rows(gv), "gdv": _rows(gdv)}
    parts = {"key" + kind: of_keys}
    if dual and splits_keys(common["CHANNELS"], q.element_size()):
        parts = {
            "key_dual_k": of_keys | {"gv": None, "gdv": None},
            "key_dual_v": of_keys | {"gk": None, "gdk": None},
        }
    for name, part in parts.items():
        if any(x is not None for x in part.values()):
            calls.append(Call(name, backward.key_kernel, common | part | {"mask": _transposed(common["mask"])}, "KEYS"))
    return calls, gradients


def _transposed(mask: Mask | None) -> Mask | None:
    """Return the mask of keys and queries."""
    return mask and (*mask[:3], mask[4], mask[3])
