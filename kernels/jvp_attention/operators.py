"""Attention's forward and backward as operators of PyTorch: opaque to torch.compile, handed plain dense tensors.

The forward is one node with two outputs, value and tangent, so its derivative sees the gradients of both together.
Without tangents it is ordinary attention.

What a transform wants of an operator it asks through PyTorch's dispatcher, which comes by once for each transform that
is under way. Reverse mode is answered by the backward operator, vmap by folding into the batch. Forward mode belongs to
a derivative around the one whose tangents attention has taken off its inputs; plain PyTorch answers it.
"""

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from jvp_attention import fallback
from jvp_attention.layout import as_rows, empty_low, empty_numbers, empty_rows, nothing

log = logging.getLogger("jvp_attention")
unpack_dual, make_dual = torch._VF._unpack_dual, torch._VF._make_dual
LIBRARY = torch.library.Library("jvp_attention", "FRAGMENT")

Six: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Results(NamedTuple):
    """What the forward operator returns; without tangents all but o and lse are `nothing`."""

    o: Tensor  # [B, H, N, D]
    do: Tensor  # [B, H, N, D]
    o_low: Tensor  # what rounding to 16 bits took from o, for the backward; nothing in float32
    do_low: Tensor
    lse: Tensor  # [B, H, N], base 2
    mu: Tensor  # [B, H, N]


class Given(NamedTuple):
    """The arguments that both operators begin with."""

    q: Tensor
    k: Tensor
    v: Tensor
    dq: Tensor | None  # None is a tangent of zero
    dk: Tensor | None
    dv: Tensor | None
    lengths: Tensor | None
    mask: Tensor | None
    scale: float
    causal: bool

    @property
    def tangents(self) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        """The tangents of q, k, v; None if all are absent."""
        dx = self.dq, self.dk, self.dv
        return None if all(x is None for x in dx) else dx


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    keep: bool,
) -> Six:
    """Compute attention and its derivative along the tangents: `Results`, o_low and do_low if `keep` asks for them."""
    given = Given(q, k, v, dq, dk, dv, lengths, mask, scale, causal)
    if stands_in(given):
        o, do, o_low, do_low, lse, mu = plain_forward(*given, keep)
        o, do, o_low, do_low = (as_rows(x) if x.ndim == 4 else x for x in (o, do, o_low, do_low))
        return o, do, o_low, do_low, lse, mu
    from jvp_attention import launch

    work = launch.forward_calls((q, k, v), given.tangents, scale, causal, lengths, mask, keep=keep)
    if given.tangents is None:
        o, lse = launch.run(work)
        return o, nothing(q), nothing(q), nothing(q), lse, _no_numbers(q)
    o, do, o_low, do_low, lse, mu = launch.run(work)
    return o, do, o_low, do_low, lse, mu


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    o: Tensor,
    do: Tensor,
    o_low: Tensor,
    do_low: Tensor,
    lse: Tensor,
    mu: Tensor,
    go: Tensor | None,
    gdo: Tensor | None,
    wanted: list[bool],
) -> Six:
    """Compute gradients of q, k, v, dq, dk, dv from those of o and do; `nothing` for those that are not wanted."""
    given = Given(q, k, v, dq, dk, dv, lengths, mask, scale, causal)
    if stands_in(given):
        found = plain_backward(*given, o, do, o_low, do_low, lse, mu, go, gdo, wanted)
        gq, gk, gv, gdq, gdk, gdv = (as_rows(x) if x.ndim == 4 else x for x in found)
        return gq, gk, gv, gdq, gdk, gdv
    from jvp_attention import launch

    # without a gradient of do the tangents have no part: ordinary attention's backward
    tangents = None if gdo is None else given.tangents
    lse, mu = lse.contiguous(), mu.contiguous()  # as kernels take them; vmap expands
    saved = launch.Saved(o, lse, None if tangents is None else do, o_low, do_low, None if tangents is None else mu)
    work = launch.backward_calls((q, k, v), tangents, saved, go, gdo, scale, causal, lengths, mask, wanted)
    results = (*launch.run(work), None, None, None)[:6]
    gq, gk, gv, gdq, gdk, gdv = (nothing(q) if x is None else x for x in results)
    return gq, gk, gv, gdq, gdk, gdv


# Plain PyTorch ---------------------------------------------------------------------------------------------------


def plain_forward(*arguments: Any) -> Six:
    """Compute what `forward` does in plain PyTorch, so that PyTorch can differentiate it again."""
    *given, keep = arguments
    q, dtype = given[0], given[0].dtype
    o, do, lse, mu = fallback.forward(fallback.problem(*given))
    if Given(*given).tangents is None:
        return o.to(dtype), nothing(q), nothing(q), nothing(q), lse, _no_numbers(q)
    low = [(x - x.to(dtype)).to(dtype) if keep and dtype.itemsize < 4 else nothing(q) for x in (o, do)]
    moved = given[3] is not None or given[4] is not None  # do the logits have a tangent?
    return o.to(dtype), do.to(dtype), low[0], low[1], lse, mu if moved else _no_numbers(q)


def _no_numbers(q: Tensor) -> Tensor:
    """Make the placeholder of mu where the logits have no tangent."""
    return q.new_empty(0, dtype=torch.float32)


def plain_backward(*arguments: Any) -> Six:
    """Compute what `backward` does in plain PyTorch, from the inputs alone."""
    given, (go, gdo, wanted) = Given(*arguments[:10]), arguments[-3:]
    found = fallback.gradients(fallback.problem(*given), go, gdo, wanted)
    inputs = (given.q, given.k, given.v) * 2
    gq, gk, gv, gdq, gdk, gdv = (
        fallback.like_input(g, x) if want else nothing(given.q)
        for g, x, want in zip(found, inputs, wanted, strict=True)
    )
    return gq, gk, gv, gdq, gdk, gdv


def stands_in(given: Given) -> bool:
    """Return whether plain PyTorch stands in for the kernels. The log says why, once: a warning if on a GPU."""
    reason = why_not(given)
    if reason:
        _log_once(reason, logging.WARNING if given.q.is_cuda else logging.INFO)
    return bool(reason)


def why_not(given: Given) -> str:
    """Say why the kernels do not run on such tensors; empty if they do."""
    q = given.q
    if not _has_triton():
        return "triton is not installed"
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels do not take {q.dtype}"
    if q.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels do not run on the {q.device.type} (only in Triton's interpreter, with TRITON_INTERPRET=1)"
    if q.device.type != "cuda" and q.dtype == torch.bfloat16:
        return "Triton's interpreter cannot compute in bfloat16"
    if not q.numel():
        return "the batch is empty"
    from jvp_attention import launch

    return launch.why_not(q, given.tangents is not None)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_once(reason: str, level: int) -> None:
    log.log(level, "plain PyTorch attention stands in: %s", reason)


# Shapes of results, for torch.compile ----------------------------------------------------------------------------


def _forward_shapes(*arguments: Any) -> Six:
    *given, keep = arguments
    q, dual = given[0], any(x is not None for x in given[3:6])
    lows = (empty_low(q), empty_low(q)) if dual and keep else (nothing(q), nothing(q))
    moved = given[3] is not None or given[4] is not None
    do, mu = empty_rows(q) if dual else nothing(q), empty_numbers(q) if moved else _no_numbers(q)
    return empty_rows(q), do, *lows, empty_numbers(q), mu


def _backward_shapes(*arguments: Any) -> Six:
    inputs, wanted = arguments[:3] * 2, arguments[-1]
    gq, gk, gv, gdq, gdk, gdv = (empty_rows(x) if want else nothing(x) for x, want in zip(inputs, wanted, strict=True))
    return gq, gk, gv, gdq, gdk, gdv


# Reverse mode ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _all_levels() -> Iterator[None]:
    """Switch derivatives on again, which an autograd.Function's forward has off, for the transforms further out."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


class _Attention(_SingleLevelFunction):
    """The forward operator where a gradient is wanted: saves what the backward needs, of what has a gradient."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Six], *arguments: Any) -> Six:
        """Call the operator of the next level down, residues included."""
        with _all_levels():
            results = Results(*below(*arguments[:-1], True))
        ctx.save_for_backward(*arguments[:8], *results)
        ctx.scale, ctx.causal = arguments[8:10]
        ctx.set_materialize_grads(False)
        constant = [] if any(ctx.needs_input_grad[1:4]) else [results.o]
        ctx.mark_non_differentiable(*constant, *results[2:])
        return results

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, gdo: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Call the backward operator for the gradients that are asked for."""
        wanted = list(ctx.needs_input_grad[1:7])
        if gdo is None:  # the tangents have no part in o
            wanted[3:] = [False] * 3
        found: tuple[Tensor | None, ...] = (None,) * 6
        if any(wanted) and not (go is None and gdo is None):
            saved = ctx.saved_tensors
            found = BACKWARD(*saved[:8], ctx.scale, ctx.causal, *saved[8:], go, gdo, wanted)
            found = tuple(x if want else None for x, want in zip(found, wanted, strict=True))
        return None, *found, *(None,) * 5


class _Gradients(_SingleLevelFunction):
    """The backward operator where a gradient of its results may be wanted, which is refused when it is."""

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Six], *arguments: Any) -> Six:
        """Call the operator of the next level down."""
        with _all_levels():
            return below(*arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Refuse."""
        raise NotImplementedError(
            "jvp_attention: no double backward (gradients of attention's gradients); "
            "forward mode around it works, and so does jvp_attention.reference.attention"
        )


# Forward mode ----------------------------------------------------------------------------------------------------


def _unpack(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Tensor | None]]:
    """Take values and tangents apart, of the transform that the dispatcher is at."""
    values = list(arguments)
    tangents: list[Tensor | None] = [None] * len(arguments)
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.is_floating_point():
            values[i], tangents[i] = unpack_dual(x, level=0)
    return values, tangents


def _below(operator: Any, keys: Any) -> Callable[..., Six]:
    """Make a call of an operator that leaves out the derivatives of the transform that the dispatcher is at."""

    def call(*arguments: Any) -> Six:
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & torch._C._after_autograd_keyset, *arguments)

    return call


def _record(function: Any, below: Callable[..., Six], arguments: tuple[Any, ...]) -> Six:
    """Call an operator, with a node for reverse mode if any argument asks for a gradient."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        with enable_single_level_autograd_function():
            return function.apply(below, *arguments)
    return below(*arguments)


def _forward_derivatives(keys: Any, *arguments: Any) -> Six:
    """Answer forward and reverse mode for the forward operator: tangents of q, k, v become its arguments."""
    below = _below(FORWARD, keys)
    values, tangents = _unpack(arguments)
    if not any(dx is not None for dx in tangents):
        return _record(_Attention, below, arguments)
    if Given(*arguments[:10]).tangents is not None:
        return _second(plain_forward, arguments)
    o, do, o_low, do_low, lse, mu = _record(_Attention, below, (*values[:3], *tangents[:3], *values[6:]))
    return make_dual(o, do, level=0), do, o_low, do_low, lse, mu


def _backward_derivatives(keys: Any, *arguments: Any) -> Six:
    """Answer forward and reverse mode for the backward operator: both are second derivatives."""
    if any(dx is not None for dx in _unpack(arguments)[1]):
        return _second(plain_backward, arguments)
    return _record(_Gradients, _below(BACKWARD, keys), arguments)


def _second(plain: Callable[..., Six], arguments: tuple[Any, ...]) -> Six:
    """Let PyTorch differentiate plain PyTorch, which in torch.compile it cannot always do."""
    _log_once("the kernels know no forward mode around another derivative", logging.WARNING)
    try:
        return plain(*arguments)
    except RuntimeError as error:
        if "INTERNAL ASSERT FAILED" not in str(error):
            raise
        raise NotImplementedError(
            "jvp_attention: no forward mode around another derivative inside torch.compile"
        ) from error


# vmap ------------------------------------------------------------------------------------------------------------


def _vmap(operator: Any) -> Callable[..., tuple[Six, tuple[int | None, ...]]]:
    """Make the rule by which an operator answers vmap: the mapped axis is folded into the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Six, tuple[int | None, ...]]:
        def fold(x: Any, axis: Any) -> Any:  # of a list of flags the axis is a list
            if not isinstance(x, Tensor) or (axis is None and x.ndim == 1 and x.numel() == 0):
                return x
            x = x.expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            return x.flatten(0, 1)

        results = operator(*(fold(x, axis) for x, axis in zip(arguments, in_dims, strict=True)))
        axes = tuple(None if x.ndim == 1 else 0 for x in results)
        unfolded = tuple(x if x.ndim == 1 else x.unflatten(0, (info.batch_size, -1)) for x in results)
        return unfolded, axes

    return rule


def _register(name: str, function: Callable[..., Six], shapes: Any, derivatives: Callable[..., Six]) -> Any:
    """Define an operator by its kernels, its results' shapes and its derivatives."""
    qualified = f"{LIBRARY.ns}::{name}"
    LIBRARY.define(name + torch.library.infer_schema(function, mutates_args=()))
    operator = getattr(getattr(torch.ops, LIBRARY.ns), name).default
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    LIBRARY.impl(name, derivatives, "Autograd", with_keyset=True)
    torch.library.register_fake(qualified, shapes, lib=LIBRARY)
    torch.library.register_vmap(qualified, _vmap(operator), lib=LIBRARY)
    return operator


FORWARD = _register("forward", forward, _forward_shapes, _forward_derivatives)
BACKWARD = _register("backward", backward, _backward_shapes, _backward_derivatives)
