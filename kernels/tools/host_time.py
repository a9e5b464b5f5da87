"""Measure how long the host takes to launch attention's kernels, which are not run.

    python kernels/tools/host_time.py

Where a layer's kernels take less time than Python takes to launch them, the GPU waits: a DiT's do at batch sizes below
a few dozen. A machine shared with others measures too much, of all rows alike, so ratios to the first row mean more
than milliseconds.
"""

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from jvp_attention import attention, dual_attention, operators
from jvp_attention.shapes import Given

SHAPE = (2, 4, 16, 64)


def median_milliseconds(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return each call's median CPU time; they take turns, so that what disturbs one disturbs all."""
    times: dict[str, list[int]] = {name: [] for name in calls}
    for i in range(repeats + 3):
        for name, call in calls.items():
            start = time.process_time_ns()
            call()
            if i >= 3:
                times[name].append(time.process_time_ns() - start)
    return {name: statistics.median(found) / 1e6 for name, found in times.items()}


def host_times(repeats: int = 300) -> dict[str, float]:
    """Return median CPU milliseconds per call, with kernels that do nothing; on a GPU if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # or plain PyTorch would stand in
    from jvp_attention import launch

    torch.set_num_threads(1)  # others would spin, and their time is counted
    q, k, v, dq, dk, dv = plain = [torch.randn(SHAPE, device=device) for _ in range(6)]
    variables = [x.clone().requires_grad_() for x in plain]

    def bare(q: Any, k: Any, v: Any) -> Any:
        return operators.FORWARD(*Given(q, k, v, None, None, None, None, None, 0.125, False), False)[0]

    def jvp(function: Callable[..., Any], x: list[Any]) -> Any:
        return torch.func.jvp(function, tuple(x[:3]), tuple(x[3:]))

    def jvp_and_backward() -> Any:
        return torch.autograd.grad(jvp(attention, variables), variables, (q, dq))

    calls = {
        "torch.func.jvp of q + k + v": lambda: jvp(lambda q, k, v: q + k + v, plain),
        "torch.func.jvp of the bare operator": lambda: jvp(bare, plain),
        "torch.func.jvp of attention": lambda: jvp(attention, plain),
        "the same, gradients wanted": lambda: jvp(attention, variables),
        "the same, and backward": jvp_and_backward,
        "dual_attention": lambda: dual_attention(q, k, v, dq, dk, dv),
        "attention": lambda: attention(q, k, v),
    }
    original, launch.Call.launch = launch.Call.launch, lambda self, tiles: None  # type: ignore[method-assign]
    try:
        return median_milliseconds(calls, repeats)
    finally:
        launch.Call.launch = original  # type: ignore[method-assign]


if __name__ == "__main__":
    times = host_times()
    for name, ms in times.items():
        print(f"{name:<36} {ms:>7.3f} ms {ms / times['torch.func.jvp of q + k + v']:>6.2f}")
