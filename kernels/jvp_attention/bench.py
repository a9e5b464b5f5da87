"""Compare time and memory of attention's JVP, forward and backward, with other implementations' on a CUDA device.

    python -m jvp_attention.bench --out h100.json
    python -m jvp_attention.bench --official ~/tvm          # a checkout of the paper's code: its kernels too
    python -m jvp_attention.bench --sizes dit --tune        # DiT-XL's shapes, tiles tuned first

Sizes are those of the paper's table 5 (B 1, H 1 and 24, N 128 to 32768, D 128) and of DiT-XL (B 32; N 256 and 1024;
18 heads of 64 channels and 16 of 72). Implementations: ours, plain PyTorch attention under torch.func.jvp,
jvp_flash_attention if it is installed, and the official kernels. Each is first compared with float64 on the same
inputs; a pass whose value, tangent or gradients are wrong is not timed. Times are medians; memory is the peak above the
inputs; rates count for every implementation the matmuls that ours takes up to 64 channels (6 forward, 21 backward; 15
would do for a backward in one pass), as a fraction of the rate of a large matmul measured in the same run.
"""

import argparse
import json
import math
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from jvp_attention import attention, reference

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Tensors = tuple[Tensor, ...]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}  # relative error, Frobenius norm
MATMULS = {"forward": 6, "backward": 21, "both": 27}
RESULTS = {"forward": ("o", "do"), "backward": ("gq", "gk", "gv", "gdq", "gdk", "gdv")}
LONGEST_CHECK = 8192  # rows that are compared with float64, whose N x N matrices must fit


class Size(NamedTuple):
    """One problem: batch, heads, queries and keys, channels per head."""

    batch: int
    heads: int
    length: int
    channels: int

    def flops(self, passes: str) -> float:
        """Operations of "forward", "backward" or "both" passes."""
        return MATMULS[passes] * 2.0 * self.batch * self.heads * self.length**2 * self.channels

    def inputs(self, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Random q, k, v, dq, dk, dv, and gradients of o and do."""
        generator = torch.Generator(device).manual_seed(0)
        return [torch.randn(*self, dtype=dtype, device=device, generator=generator) for _ in range(8)]


TABLE_5 = [Size(1, heads, 2**i, 128) for heads in (1, 24) for i in (7, 10, 12, 13, 14, 15)]
DIT = [Size(32, heads, n, d) for heads, d in ((18, 64), (16, 72)) for n in (256, 1024)]
SIZES = {"table5": TABLE_5, "dit": DIT, "all": TABLE_5 + DIT}


def official_attention(checkout: Path) -> Attention:
    """Import the kernels of a checkout of the paper's repository: correct only under torch.func.jvp."""
    sys.path.insert(0, str(checkout))
    from jvp_utils.functional import sdpa_jvp  # type: ignore[import-not-found]

    return sdpa_jvp


def flash_attention() -> Attention | None:
    """Import the function of the package jvp_flash_attention, if it is installed."""
    try:
        from jvp_flash_attention.jvp_attention import attention as theirs  # type: ignore[import-not-found]
    except ImportError:
        return None
    return theirs


def forward(function: Attention, inputs: list[Tensor]) -> Tensors:
    """Return the function's value and tangent: o, do."""
    result = torch.func.jvp(function, tuple(inputs[:3]), tuple(inputs[3:6]))
    return result[0], result[1]


def gradients(outputs: Tensors, inputs: list[Tensor], *, retain: bool = False) -> Tensors:
    """Gradients of q, k, v, dq, dk, dv."""
    return torch.autograd.grad(outputs, inputs[:6], inputs[6:], retain_graph=retain)


def wrong(function: Attention, size: Size, device: str, dtype: torch.dtype) -> dict[str, str]:
    """List what is wrong with "forward" and "backward" of an implementation, for one head of this size."""
    size = Size(1, min(size.heads, 2), min(size.length, LONGEST_CHECK), size.channels)
    inputs = [x.requires_grad_() for x in size.inputs(device, dtype)]
    exact = [x[:, :1].detach().double().requires_grad_() for x in inputs]
    right = forward(reference.attention, exact)
    found: dict[str, str] = {}
    problem = "forward"
    try:
        outputs = forward(function, inputs)
        found |= {"forward": _differences(RESULTS["forward"], outputs, right, dtype)}
        problem = "backward"
        pair = gradients(outputs, inputs), gradients(right, exact)
        found |= {"backward": _differences(RESULTS["backward"], *pair, dtype)}
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # third-party code may raise anything
        message = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        found |= {problem: message}
    return {passes: text for passes, text in found.items() if text}


def _differences(names: tuple[str, ...], found: Tensors, right: Tensors, dtype: torch.dtype) -> str:
    """List which results of the first head are off by more than the dtype's tolerance, NaN included, and by how far."""
    off = {}
    for name, a, b in zip(names, found, right, strict=True):
        off[name] = float((a[:, :1].detach().double() - b.detach()).norm() / b.detach().norm())
    return ", ".join(f"{name} off by {e:.1e}" for name, e in off.items() if not e <= TOLERANCE[dtype])


def measure(function: Attention, size: Size, dtype: torch.dtype, *, backward: bool = True) -> dict[str, float]:
    """Median milliseconds of the passes, and MiB at the peak of forward and backward above the inputs."""
    from triton.testing import do_bench

    def time(call: Callable[[], Any]) -> float:
        return do_bench(call, return_mode="median")

    inputs = size.inputs("cuda", dtype)
    with torch.no_grad():
        result = {"forward": time(lambda: forward(function, inputs))}
    if not backward:
        return result
    inputs = [x.requires_grad_() for x in inputs]
    result["backward"] = time(partial(gradients, forward(function, inputs), inputs, retain=True))
    result["both"] = time(lambda: gradients(forward(function, inputs), inputs))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    gradients(forward(function, inputs), inputs)
    result["mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return result


def matmul_rate(dtype: torch.dtype, n: int = 8192) -> float:
    """TFLOP/s of a large matmul."""
    from triton.testing import do_bench

    a, b = torch.randn(2, n, n, dtype=dtype, device="cuda")
    return 2 * n**3 / do_bench(lambda: a @ b, return_mode="median") / 1e9


def row(name: str, size: Size, function: Attention, dtype: torch.dtype) -> dict[str, Any]:
    """Format one line of the report: times of the passes that are right, and what is wrong with the others."""
    result: dict[str, Any] = {"name": name, **size._asdict()}
    try:
        problems = wrong(function, size, "cuda", dtype)
        if "forward" not in problems:
            result |= measure(function, size, dtype, backward="backward" not in problems)
        return result | ({"wrong": "; ".join(problems.values())} if problems else {})
    except torch.cuda.OutOfMemoryError:
        return result | {"wrong": "out of memory"}
    finally:
        torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]], rate: float) -> str:
    """Format the report as text; shares of the rate of a matmul in TFLOP/s."""
    lines = [
        f"{'B':>3} {'H':>3} {'N':>6} {'D':>4}  {'':<20} {'forward':>10} {'share':>6} {'backward':>10} {'share':>6} "
        f"{'both':>10} {'peak':>10}"
    ]
    for r in rows:
        size = Size(*(r[k] for k in Size._fields))
        text = f"{size.batch:>3} {size.heads:>3} {size.length:>6} {size.channels:>4}  {r['name']:<20}"
        for passes in ("forward", "backward"):
            if passes in r:
                text += f" {r[passes]:>7.3f} ms {size.flops(passes) / r[passes] / 1e9 / rate:>6.1%}"
        text += f" {r['both']:>7.3f} ms {r['mib']:>6.0f} MiB" if "both" in r else ""
        lines.append(text + (f" not timed: {r['wrong']}" if "wrong" in r else ""))
    return "\n".join(lines)


def speedups(rows: list[dict[str, Any]]) -> str:
    """Compute how many times faster ours is than each other one: geometric means over sizes where both were timed."""
    timed = {(r["name"], *(r[k] for k in Size._fields)): r for r in rows}
    lines = []
    for name in dict.fromkeys(r["name"] for r in rows if r["name"] != "ours"):
        for passes in MATMULS:
            pairs = [(timed["ours", *k[1:]], r) for k, r in timed.items() if k[0] == name]
            ratios = [theirs[passes] / ours[passes] for ours, theirs in pairs if passes in ours and passes in theirs]
            if ratios:
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                lines.append(f"{passes:<8} {mean:6.2f} x as fast as {name} ({len(ratios)} sizes)")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Make the command line."""
    p = argparse.ArgumentParser(
        "python -m jvp_attention.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--sizes", choices=SIZES, default="all", help="which sizes to measure (default: all)")
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="data type of the inputs (default: bfloat16)")
    p.add_argument("--official", type=Path, metavar="PATH", help="also measure this checkout of the paper's code")
    p.add_argument("--tune", action="store_true", help="let every kernel choose its fastest tiles first")
    p.add_argument("--out", type=Path, metavar="FILE", help="also write the results to this new JSON file")
    return p


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    args = parser().parse_args(argv)
    problem = ""
    if args.official and not (args.official / "jvp_utils" / "functional.py").is_file():
        problem = f"{args.official} holds no jvp_utils/functional.py: give a checkout of the paper's repository"
    elif args.out and (args.out.exists() or not args.out.absolute().parent.is_dir()):
        problem = f"{args.out} exists already, or its folder does not; choose another --out"
    elif not torch.cuda.is_available():
        problem = "needs a CUDA device"
    if problem:
        print(f"python -m jvp_attention.bench: error: {problem}", file=sys.stderr)
        return 2
    if args.tune:
        os.environ["JVP_ATTENTION_TUNE"] = "1"
    dtype = DTYPES[args.dtype]
    functions: dict[str, Attention] = {"ours": attention, "plain": reference.attention}
    functions |= {"jvp_flash_attention": f} if (f := flash_attention()) else {}
    functions |= {"official": official_attention(args.official)} if args.official else {}
    rate = matmul_rate(dtype)
    work = [(name, size) for size in SIZES[args.sizes] for name in functions]
    rows = [
        row(name, size, functions[name], dtype)
        for name, size in tqdm(work, desc="measuring", unit="case", disable=None)
    ]
    import triton

    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "dtype": args.dtype,
        "tuned": args.tune,
        "matmul_tflops": rate,
    }
    print(", ".join(f"{k} {v:.0f}" if isinstance(v, float) else f"{k} {v}" for k, v in about.items()))
    print(table(rows, rate), speedups(rows), sep="\n\n")
    if args.out:
        args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
