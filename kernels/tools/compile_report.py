"""Report what the compiler makes of every kernel, for a GPU that need not be present.

    python kernels/tools/compile_report.py                       # default tiles, bfloat16, heads of 64 and 128
    python kernels/tools/compile_report.py --dims 72 256 --dtype float32
    python kernels/tools/compile_report.py --all                 # every candidate of the tuning, not the default alone
    python kernels/tools/compile_report.py --clocks              # and a static roofline, see clocks.py
    python kernels/tools/compile_report.py --arch 80 89 120      # other cards than an H100 (90)

Prints, per kernel: matmuls per pair of tiles, registers per thread (255 is the most), bytes of stack per
thread (registers that were spilled lie there), shared memory (the most is 227 KiB on sm_90 and sm_100, 163 on sm_80, 99
on sm_86, sm_89 and sm_120) and instructions for Hopper's matrix units (none for float32, which runs without). With
--clocks also clocks of a multiprocessor per 128 queries and 128 keys. Takes seconds per kernel.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clocks import count, machine_code
from jvp_attention.shapes import LARGEST_HEAD, Given
from jvp_attention.tile_sizes import Tiles

SM = 90
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # per block, by architecture
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32"}
POINTERS |= {torch.int64: "*i64", torch.uint8: "*u8"}
LENGTH = 4096  # of queries and keys: not short, and divisible by the tiles
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
    import triton
    from triton.compiler import ASTSource

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


def compile_call(call: Any, tiles: Tiles, sm: int = SM) -> Any:
    """Compile the kernel of a call for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget

    return triton.compile(source(call, tiles), target=GPUTarget("cuda", sm, 32), options=tiles.options())


def usage(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of stack per thread, as cuobjdump reads them from the compiled kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    figures = {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}  # type: ignore[index]
    return figures["REG"], figures["STACK"]


def report(call: Any, tiles: Tiles, sm: int = SM, *, clocks: bool = False) -> dict[str, Any]:
    """Collect the figures of a kernel with a choice of tiles; clocks of a multiprocessor are per 128 x 128 pairs."""
    compiled = compile_call(call, tiles, sm)
    registers, stack = usage(compiled)
    counted = {}
    if clocks and call.name != "row_sum":
        found = count(machine_code(compiled.asm["cubin"]), tiles.warps, sm)
        found = found.per_pairs(128 * 128 / (tiles.queries * tiles.keys))
        counted = {**found._asdict(), "sum": found.without_overlap, "limit": found.limit}
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
        **counted,
    }


COUNTED = ("tensor", "operands", "matrix", "loads", "exp2", "issue", "barriers", "sum")


def line(r: dict[str, Any]) -> str:
    """Format one row of the table."""
    tiles = f"{r['queries']} x {r['keys']}, {r['warps']} warps, {r['stages']} stages"
    counted = "".join(f" {r[name]:>8.0f}" for name in COUNTED) + f" {r['limit']}" if "limit" in r else ""
    return (
        f"{r['arch']:<4} {r['kernel']:<13} {r['D']:>4} {tiles:<28} {r['matmuls']:>8} {r['registers']:>9} "
        f"{r['stack']:>6} {r['shared_kib']:>6.1f} {r['wgmma']:>6}{counted}"
    )


def header(clocks: bool) -> str:
    """Format the names of the columns."""
    counted = "".join(f" {name:>8}" for name in COUNTED) + " limit" if clocks else ""
    return (
        f"{'arch':<4} {'kernel':<13} {'D':>4} {'queries x keys':<28} {'matmuls':>8} {'registers':>9} "
        f"{'stack':>6} {'KiB':>6} {'wgmma':>6}{counted}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    p = argparse.ArgumentParser(
        "python kernels/tools/compile_report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--dims", type=int, nargs="+", default=[64, 128], help="channels of a head (default: 64 128)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the inputs (default: bfloat16)")
    p.add_argument("--causal", action="store_true", help="the causal kernels")
    p.add_argument("--lengths", action="store_true", help="the kernels that are given how many keys to see")
    p.add_argument("--all", action="store_true", help="every candidate of the tuning, not the default alone")
    p.add_argument("--arch", type=int, nargs="+", choices=SHARED_KIB, default=[SM], help="to compile for (default: 90)")
    p.add_argument("--clocks", action="store_true", help="count clocks in the machine code")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this new file")
    args = p.parse_args(argv)
    problem = _problem(args)
    if problem:
        print(f"{p.prog}: error: {problem}", file=sys.stderr)
        return 2
    rows = []
    print(header(args.clocks))
    for sm, d in itertools.product(args.arch, args.dims):
        for call in calls(d, DTYPES[args.dtype], causal=args.causal, lengths=args.lengths):
            for tiles in call.candidates(SHARED_KIB[sm])[: None if args.all else 1]:
                rows.append(report(call, tiles, sm, clocks=args.clocks))
                print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _problem(args: argparse.Namespace) -> str:
    """Say what is wrong with the options or the surroundings; empty if nothing is."""
    if not all(1 <= d <= LARGEST_HEAD for d in args.dims):
        return f"--dims must lie between 1 and {LARGEST_HEAD}"
    if args.json and args.json.exists():
        return f"{args.json} exists already; choose another --json"
    if args.json and not args.json.absolute().parent.is_dir():
        return f"the folder of {args.json} does not exist"
    if args.clocks and 100 in args.arch:
        return "--clocks knows no matrix instructions of sm_100"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "TRITON_INTERPRET=1 is set, and the interpreter compiles nothing: unset it"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed (Linux: pip install triton)"
    return ""


if __name__ == "__main__":
    sys.exit(main())
