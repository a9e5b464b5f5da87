"""Compare the plain PyTorch fallback of the kernels with what one would use instead, on a CPU.

    python kernels/tools/plain_time.py           # N = 1024
    python kernels/tools/plain_time.py 256 2048

One batch element, 4 heads of 64 channels, one thread; CPU times are medians of interleaved calls. Without tangents
the ratio is to scaled_dot_product_attention, with tangents to softmax(q k^T) v under torch.func.jvp. "lengths" are an
eighth of the keys, and their ratio is to the same call without.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from jvp_attention import attention, reference


def median_milliseconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return each call's median CPU time; calls are interleaved, so that disturbances affect all alike."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    for i in range(repeats + 3):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            if i >= 3:
                times[name].append(time.process_time_ns() - start)
    return {name: statistics.median(found) / 1e6 for name, found in times.items()}


def value(function: Callable[..., Any], x: list[Any]) -> Any:
    """Compute the value, as in sampling."""
    with torch.no_grad():
        return function(*x[:3])


def gradients(function: Callable[..., Any], x: list[Any]) -> Any:
    """Compute the value and its gradients."""
    return torch.autograd.grad(function(*x[:3]), x[:3], x[6])


def tangent(function: Callable[..., Any], x: list[Any]) -> Any:
    """Compute value and tangent."""
    return torch.func.jvp(function, tuple(x[:3]), tuple(x[3:6]))


def all_six(function: Callable[..., Any], x: list[Any]) -> Any:
    """Compute value, tangent and all gradients."""
    return torch.autograd.grad(tangent(function, x), x[:6], (x[6], x[6]))


def ratios(n: int, dtype: torch.dtype) -> dict[str, float]:
    """Measure the ratio of times for each case."""
    data = [torch.randn(1, 4, n, 64, dtype=dtype) for _ in range(7)]
    variables = [x.requires_grad_() for x in data[:6]] + data[6:]
    found = {}
    for causal in (False, True):
        ours = partial(attention, causal=causal)
        for call in (value, gradients, tangent, all_six):
            plain = partial(reference.attention, causal=causal)
            other = partial(scaled_dot_product_attention, is_causal=causal) if call in (value, gradients) else plain
            times = median_milliseconds({"a": lambda: call(ours, variables), "b": lambda: call(other, variables)}, 7)  # noqa: B023
            found[f"{call.__name__}{', causal' * causal}"] = times["a"] / times["b"]
    few = partial(attention, lengths=torch.tensor([n // 8]))
    times = median_milliseconds({"a": lambda: all_six(few, variables), "b": lambda: all_six(attention, variables)}, 7)
    return found | {"all_six, lengths": times["a"] / times["b"]}


def main() -> int:
    """Print the ratios; returns the exit status."""
    torch.set_num_threads(1)
    for n in map(int, sys.argv[1:] or ["1024"]):
        for dtype in (torch.float32, torch.bfloat16):
            print(
                f"N = {n}, {dtype}:", ", ".join(f"{name} {x:.2f}" for name, x in ratios(n, dtype).items()), flush=True
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
