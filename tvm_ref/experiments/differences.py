"""Take dF/ds by a central difference in s instead of a JVP, and measure the loss of accuracy."""

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from tvm_ref.flow_map import FlowMap, jvp
from tvm_ref.guidance import Condition
from tvm_ref.shapes import Sample, Time, over

STEPS = (0.001, 0.003, 0.01, 0.03, 0.1)  # step sizes of the differences
Errors = dict[str, dict[str, float]]  # by precision and by method

# data type of matmuls, and whether times are rounded to it
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "bfloat16": (torch.bfloat16, False),
    "bfloat16, times too": (torch.bfloat16, True),
    "float16": (torch.float16, False),
    "float16, times too": (torch.float16, True),
}


def autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    """Compute matmuls in a data type on the CPU, as mixed-precision training does."""
    return torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()


class Differenced(FlowMap):
    """A FlowMap whose dF/ds is a central difference: two forwards of any network, and no JVP.

    It is also that of f = (s - t) F: with F the mean of both, (f(s + h) - f(s - h)) / (2 h) = F + (s - t) dF/ds.
    Within h of the ends the network is called with s outside of [0, t].
    """

    def __init__(self, network: nn.Module, step: float):
        super().__init__(network)
        self.step = step

    def displacement_and_terminal_velocity(
        self, x: Sample, t: Time, s: Time, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Sample, Sample]:
        """Return f(x, t, s) and d/ds f, both [B, ...], up to the order of the step squared."""
        before, after = (self.F(x, t, s + h, condition) for h in (-self.step, self.step))
        F, dF_ds = (before + after) / 2, (after - before) / (2 * self.step)
        return over(s - t, x) * F, F + over(s - t, x) * (dF_ds.detach() if detach_jvp else dF_ds)


@torch.no_grad()
def derivative_errors(network: nn.Module, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Errors:
    """Measure the relative error of a network's dF/ds, in the root mean square, by precision and by method.

    The methods are the JVP and central differences with STEPS; the reference is the JVP of the network in float64.
    """

    def by_jvp(F: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
        return jvp(F, (s,), (torch.ones_like(s),))[1]

    def by_difference(F: Callable[[Tensor], Tensor], s: Tensor, step: float) -> Tensor:
        return (F(s + step).double() - F(s - step).double()) / (2 * step)

    def rounded(a: Tensor, dtype: torch.dtype | None) -> Tensor:
        return a if dtype is None else a.to(dtype).to(a.dtype)

    wide = copy.deepcopy(network).double()
    labels = None if condition is None else Condition(condition.label, condition.beta.double())
    exact = by_jvp(lambda s: wide(x.double(), t.double(), s, labels), s.double())
    methods: dict[str, Callable[..., Tensor]] = {"JVP": by_jvp}
    methods |= {f"{step:g}": partial(by_difference, step=step) for step in STEPS}
    found: Errors = {}
    for name, (dtype, times) in PRECISIONS.items():
        to = dtype if times else None

        def F(s: Tensor, to: torch.dtype | None = to) -> Tensor:
            y: Tensor = network(x, rounded(t, to), rounded(s, to), condition)
            return y

        with autocast(dtype):
            errors = {key: method(F, s).double() - exact for key, method in methods.items()}
        found[name] = {key: float(error.norm() / exact.norm()) for key, error in errors.items()}
    return found


def derivative_table(measured: Sequence[Errors]) -> str:
    """Format the relative error of dF/ds, the least and the largest over several networks, by precision and method."""
    lines = [f"{'error of dF/ds':<20}" + "".join(f"{method:>18}" for method in measured[0]["float32"])]
    for name, row in measured[0].items():
        ranges = ([found[name][method] for found in measured] for method in row)
        texts = [f"{min(values):.1e}" + f"-{max(values):.1e}" * (len(values) > 1) for values in ranges]
        lines.append(f"{name:<20}" + "".join(f"{text:>18}" for text in texts))
    return "\n".join(lines)
