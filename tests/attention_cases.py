"""Attention's inputs on poisoned memory, its float64 reference, and how far results may lie from it."""

import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

import jvp_attention
from jvp_attention import reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # relative, in the Frobenius norm
NAMES = ("o", "do", "gq", "gk", "gv", "gdq", "gdk", "gdv")
ORDERS = ((0, 1, 2), (0, 2, 1), (2, 1, 0))  # of B, H and rows in memory
GAP = 3  # elements of poison after every axis
SENTINEL = 777.0


def interpreter_works() -> bool:
    """Tell whether Triton's interpreter can run a loop: that of triton 3.6 fails with numpy 2.4."""
    return importlib.metadata.version("triton") >= "3.7" or np.lib.NumpyVersion(np.__version__) < "2.4.0"


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The bits of float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(x).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """The float32 numbers of such bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def on_poison(x: Tensor, order: Sequence[int] = (0, 1, 2), gap: int = GAP) -> Tensor:
    """X [B, H, rows, D] as a view into memory that is NaN everywhere else, its axes in the given order."""
    return _inside(x.shape, x.dtype, x.device, order, gap, math.nan)[1].copy_(x)


def _inside(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, order: Sequence[int], gap: int, poison: float
) -> tuple[Tensor, Tensor]:
    """A buffer full of poison, and a view of the given shape into its middle."""
    axes = (*order, 3)
    buffer = torch.full([shape[a] + gap for a in axes], poison, dtype=dtype, device=device)
    inner = buffer[tuple(slice(gap // 2, gap // 2 + shape[a]) for a in axes)]
    return buffer, inner.permute([axes.index(a) for a in range(4)])


def worst_error(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The largest relative Frobenius error; a result is held to a tenth of the largest number at least."""
    size = max(float(x.abs().max()) for x in exact)
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        assert a.shape == b.shape
        norm = max(float(b.norm()), 0.1 * size * b.numel() ** 0.5, 1e-30)
        error = float((a.double().cpu() - b.double().cpu()).norm()) / norm
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


class GuardedOutputs:
    """Stands in for the allocation of results: NaN inside, and memory around it that nobody may write."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, Tensor]] = []

    def rows(self, like: Tensor) -> Tensor:
        """In place of empty_rows."""
        return self._keep(*_inside(like.shape, like.dtype, like.device, (0, 2, 1), GAP, SENTINEL))

    def numbers(self, like: Tensor) -> Tensor:
        """In place of empty_numbers."""
        count = math.prod(like.shape[:3])
        buffer = torch.full((count + 200,), SENTINEL, device=like.device)
        return self._keep(buffer, buffer[100 : 100 + count].view(like.shape[:3]))

    def _keep(self, buffer: Tensor, inner: Tensor) -> Tensor:
        inner.fill_(math.nan)
        self.buffers.append((buffer, inner.detach()))
        return inner

    def check(self) -> None:
        """Everything inside was written, nothing around it."""
        for buffer, inner in self.buffers:
            assert not inner.isnan().any(), "a part of a result was not written"
            inner.fill_(SENTINEL)
            assert bool((buffer == SENTINEL).all()), "written beyond a result"


@dataclass
class Case:
    """One problem: inputs, tangents and gradients of the outputs; None where there is none."""

    shape: tuple[int, int, int, int, int]  # B, H, N, M, D
    dtype: torch.dtype = torch.float32
    causal: bool = False
    scale: float | None = None
    tangents: tuple[bool, bool, bool] = (True, True, True)  # of q, k, v
    gradients: tuple[bool, bool] = (True, True)  # of o, do
    orders: Sequence[Sequence[int]] = ((0, 1, 2),) * 6
    device: str = "cpu"
    seed: int = 0
    lengths: Sequence[int] | None = None  # keys and values, and their tangents, are NaN beyond
    edit: Callable[[list[Tensor]], None] | None = None  # changes q, k, v, dq, dk, dv, go, gdo in place, in float64
    tensors: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        b, h, n, m, d = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        rows = (n, m, m, n, m, m, n, n)
        exact = [torch.randn(b, h, r, d, dtype=torch.float64, generator=generator) for r in rows]
        if self.edit:
            self.edit(exact)
        for i, length in enumerate(self.lengths or ()):
            for j in (1, 2, 4, 5):
                exact[j][i, :, max(length, 0) :] = math.nan
        orders = [*self.orders, (0, 1, 2), (0, 2, 1)]
        self.tensors = [on_poison(x.to(self.dtype).to(self.device), o) for x, o in zip(exact, orders, strict=True)]

    def results(self, attention: Callable[..., Tensor], tensors: list[Tensor] | None = None) -> list[Tensor]:
        """[o, do, gradients of q, k, v and of the tangents that there are], by torch.func.jvp and autograd."""
        *inputs, go, gdo = self.tensors if tensors is None else tensors
        inputs = [x.detach().requires_grad_() for x in inputs]
        lengths = None if self.lengths is None else torch.tensor(self.lengths, device=go.device)
        with_tangent = [i for i in range(3) if self.tangents[i]]

        def of_some(*some: Tensor) -> Tensor:
            given = dict(zip(with_tangent, some, strict=True))
            qkv = [given.get(i, inputs[i]) for i in range(3)]
            return attention(*qkv, scale=self.scale, causal=self.causal, lengths=lengths)

        variables = inputs[:3] + [inputs[3 + i] for i in with_tangent]
        if with_tangent:
            primals, tangents = zip(*((inputs[i], inputs[3 + i]) for i in with_tangent), strict=True)
            outputs = list(torch.func.jvp(of_some, primals, tangents))
        else:
            outputs = [of_some()]
        pairs = [(x, g) for x, g, wanted in zip(outputs, (go, gdo), self.gradients, strict=False) if wanted]
        if not pairs:
            return [x.detach() for x in outputs]
        values, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(values, variables, given, allow_unused=True)
        zeros = [torch.zeros_like(x) if g is None else g for x, g in zip(variables, found, strict=True)]
        return [x.detach() for x in (*outputs, *zeros)]

    def exact(self) -> list[Tensor]:
        """The same of the reference in float64, on the CPU."""
        return self.results(reference.attention, [x.detach().double().cpu() for x in self.tensors])

    def errors(self, results: list[Tensor], *, cancelling: bool = False) -> list[float]:
        """Relative Frobenius errors.

        A result that is exactly zero is held to a tenth of its fellows' largest number; so is, if `cancelling`, one
        that is small beside it because large terms in it cancel.
        """
        exact = self.exact()
        assert len(exact) == len(results)
        outputs = exact[: 1 + any(self.tangents)]
        errors = []
        for group in (outputs, exact[len(outputs) :]):
            size = max((float(x.abs().max()) for x in group), default=0)
            for x in group:
                found = results[len(errors)].double().cpu()
                assert found.shape == x.shape
                norm, floor = float(x.norm()), max(0.1 * size * x.numel() ** 0.5, 1e-30)
                scale = max(norm, floor) if cancelling or norm == 0 else norm
                errors.append(float((found - x).norm()) / scale)
        return errors

    def check(self, attention: Callable[..., Tensor], *, ill_conditioned: bool = False) -> None:
        """Fail unless every result is within the dtype's tolerance.

        Results of a drawn or edited problem may cancel. An ill-conditioned one in 16 bits may be beyond the tolerance
        where plain PyTorch is too: few rows, large logits.
        """
        cancelling = ill_conditioned or self.edit is not None
        errors = self.errors(self.results(attention), cancelling=cancelling)
        limits = [TOLERANCE[self.dtype]] * len(errors)
        if ill_conditioned and self.dtype.itemsize == 2:
            plain = self.errors(self.results(reference.attention), cancelling=cancelling)
            limits = [max(limit, e) for limit, e in zip(limits, plain, strict=True)]
        assert all(e <= limit for e, limit in zip(errors, limits, strict=True)), (
            f"{self.shape}: {[f'{e:.1e}' for e in errors]}, allowed {[f'{e:.1e}' for e in limits]}"
        )


class SelfAttention(nn.Module):
    """Self-attention of tokens [B, N, width] with a residual, by the attention that it is given."""

    def __init__(self, attention: Callable[..., Tensor] = jvp_attention.attention, width: int = 32) -> None:
        super().__init__()
        self.attention = attention
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.project(self.attention(q, k, v).transpose(1, 2).flatten(2))
