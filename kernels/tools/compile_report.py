"""Report what the compiler makes of every kernel, for a GPU that need not be present.

    python kernels/tools/compile_report.py                       # default tiles, bfloat16, heads of 64 and 128
    python kernels/tools/compile_report.py --dims 72 256 --dtype float32
    python kernels/tools/compile_report.py --all                 # every candidate of the tuning, not only the default
    python kernels/tools/compile_report.py --arch 80 89 120      # other cards than an H100 (90)

Prints, per kernel: matmuls per pair of tiles, registers per thread (255 is the most), bytes of stack per
thread (for spilled registers), shared memory (the most is 227 KiB on sm_90 and sm_100, 163 on sm_80, 99
on sm_86, sm_89 and sm_120) and instructions for Hopper's matrix units (none for float32, which runs without). Takes
seconds per kernel.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from jvp_attention.shapes import LARGEST_HEAD, Given
from jvp_attention.tile_sizes import Tiles

SM = 90
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # per block, by architecture
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
POINTERS |= {torch.int64: "*i64", torch.uint8: "*u8"}
LENGTH = 4096  # of queries and keys: not short, and divisible by the tiles
WIDTHS = {"arch": 4, "kernel": 12, "D": 3, "queries": 7, "keys": 4, "warps": 5, "stages": 6, "effort": 6}
WIDTHS |= {"matmuls": 7, "registers": 9, "stack": 5, "shared_kib": 10, "wgmma": 5}
MULTIPLE_OF_16 = [["tt.divisibility", 16]]


def calls(d: int, dtype: torch.dtype, *, causal: bool = False, lengths: bool = False) -> list[Any]:
    """List every launch that attention can make with heads of d channels, on tensors without memory."""
    from jvp_attention import launch

    def rows() -> Tensor:
        return torch.empty(1, LENGTH, 16, d, dtype=dtype, device="meta").transpose(1, 2)

    of_keys = torch.empty(1, dtype=torch.int32, device="meta") if lengths else None
    dual = Given(rows(), rows(), rows(), rows(), rows(), rows(), of_keys, None, 1.0, causal)
    found = []
    for given, gdo in ((dual.without_tangents(), None), (dual, rows())):
        first, results = launch.forward_calls(given)
        found += first + launch.backward_calls(given, results, rows(), gdo)[0]
    return found


def source(call: Any, tiles: Tiles) -> Any:
    """Return the kernel of a call as the compiler takes it, arguments specialised as at its launch."""
    from jvp_attention import launch

    kernel, arguments = call.kernel, launch.in_units(call.arguments) | tiles.sizes()
    if isinstance(kernel, triton.runtime.autotuner.Heuristics):
        arguments |= {name: rule(arguments) for name, rule in kernel.values.items()}
        kernel = kernel.fn
    constant = {p.name for p in kernel.params if p.is_constexpr}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}

    def kind(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            return tuple(kind(v, (*path, j)) for j, v in enumerate(value))
        if value is None or kernel.arg_names[path[0]] in constant or (type(value) is int and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[path] = MULTIPLE_OF_16
        if isinstance(value, Tensor):
            return POINTERS[value.dtype]
        return "i32" if isinstance(value, int) else "fp32"

    signature = {name: kind(arguments[name], (i,)) for i, name in enumerate(kernel.arg_names)}
    return ASTSource(kernel, signature, constants, attributes)


def usage(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as cuobjdump reads them from the compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    return figures["REG"], figures["STACK"]


def report(call: Any, tiles: Tiles, sm: int = SM) -> dict[str, Any]:
    """Collect the metrics of a kernel with a choice of tiles."""
    compiled = triton.compile(source(call, tiles), target=GPUTarget("cuda", sm, 32), options=tiles.options())
    registers, stack = usage(compiled)
    return {
        "arch": sm,
        "kernel": call.name,
        "D": call.arguments["D"],
        **tiles._asdict(),
        "matmuls": len(re.findall(r"\btt\.dot\b.*(?<!x8xf32>) loc", compiled.asm["ttir"])),
        "registers": registers,
        "stack": stack,
        "shared_kib": compiled.metadata.shared / 1024,
        "wgmma": compiled.asm["ptx"].count("wgmma.mma_async"),
    }


def line(values: Iterable[Any]) -> str:
    """Format one row of the table."""
    return " ".join(f"{value:>{width}}" for value, width in zip(values, WIDTHS.values(), strict=True))


def main() -> None:
    """Run the command."""
    p = argparse.ArgumentParser(
        "python kernels/tools/compile_report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="channels of a head (default: 64 128)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the inputs (default: bfloat16)")
    p.add_argument("--kernels", nargs="+", metavar="NAME", help="report only these kernels (default: all)")
    p.add_argument("--causal", action="store_true", help="report the causal kernels")
    p.add_argument("--lengths", action="store_true", help="report the kernels with `lengths`")
    p.add_argument("--all", action="store_true", help="every candidate of the tuning, not only the default")
    p.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=[SM], help="target GPUs (default: 90)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the report to this file")
    args = p.parse_args()
    if max(args.dims) > LARGEST_HEAD:
        p.error(f"--dims are at most {LARGEST_HEAD}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        p.error("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it")
    rows = []
    print(line(WIDTHS))
    for sm, d in itertools.product(args.arch, args.dims):
        found = calls(d, DTYPES[args.dtype], causal=args.causal, lengths=args.lengths)
        for call in (call for call in found if call.name in (args.kernels or call.name)):
            for tiles in call.candidates(SHARED_KIB[sm])[: None if args.all else 1]:
                rows.append(report(call, tiles, sm))
                print(line(rows[-1].values()), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
