"""Every specialisation of the kernels through Triton's front end: what is absent, masks, lengths, sizes of 1.

    PYTHONPATH=kernels/tools python -m tests.jvp_attention.front_end

A process of its own, because the interpreter may not be switched on. Prints how many were parsed.
"""

import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend

from compile_report import source
from jvp_attention import launch
from jvp_attention.shapes import Given

BOOLEANS = (False, True)
SIZES = [(2, 4, 2, 128, 64), (1, 1, 1, 1, 1), (2, 2, 2, 1, 50), (1, 2, 1, 70, 1), (2, 1, 1, 50, 70)]  # B, H, G, N, M
KINDS = list(itertools.product(SIZES, (torch.float16, torch.float32), (64, 72)))  # with channels


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def problem(kind: int, tangents: tuple[bool, ...], causal: bool, lengths: bool, mask: bool) -> tuple[Given, Tensor]:
    """Arguments of one of the KINDS, and a gradient."""
    (b, h, g, n, m), dtype, d = KINDS[kind % len(KINDS)]
    q, k, v = (empty(b, heads, rows, d, dtype=dtype) for heads, rows in ((h, n), (g, m), (g, m)))
    dx = (x if there else None for x, there in zip((q, k, v), tangents, strict=True))
    options = (
        empty(b, dtype=torch.int64) if lengths else None,
        empty(b if kind % 2 else 1, 1, n, m, dtype=torch.bool) if mask else None,
    )
    return Given(q, k, v, *dx, *options, 0.3, causal), empty(b, h, n, d, dtype=dtype)


def calls() -> Iterator[Any]:
    """Every combination of options, the kinds of inputs in turn; and every subset of gradients."""
    kind = 0
    for *tangents, causal, lengths, mask in itertools.product(BOOLEANS, repeat=6):
        for gradients in ((True, True), (False, True), (True, False)):
            kind += 1
            given, g = problem(kind, tuple(tangents), causal, lengths, mask)
            first, results = launch.forward_calls(given, keep=bool(kind % 3))
            yield from first
            go, gdo = (g if there else None for there in gradients)
            if gdo is None or not given.has_tangent:
                given, go, gdo = given.without_tangents(), g, None
            yield from launch.backward_calls(given, results, go, gdo)[0]
    for wanted in itertools.product(BOOLEANS, repeat=6):
        kind += 1
        given, g = problem(kind, (True, True, True), False, False, False)
        results = launch.forward_calls(given)[1]
        yield from launch.backward_calls(given, results, g, g, wanted)[0]


def main() -> int:
    """Parse them all."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    count = 0
    for call in calls():
        tiles = call.candidates(227)[0]
        if call.arguments.get("mask") is not None:  # the launch lists the tiles that it leaves
            _, b, h, *_ = call.arguments["mask"]
            listed = empty(1, dtype=torch.int32), 6 if b else 0, 6 if h else 0, 3
            call = call._replace(arguments=call.arguments | {"tiles": listed})
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        options = backend.parse_options(tiles.options())
        functions = backend.get_codegen_implementation(options), backend.get_module_map()
        source(call, tiles).make_ir(target, options, *functions, context)
        count += 1
    print(count)
    return 0


if __name__ == "__main__":
    sys.exit(main())
