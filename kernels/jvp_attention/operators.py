"""Attention's forward and backward as operators of PyTorch: opaque to torch.compile, handed plain dense tensors.

The forward is one node with two outputs, value and tangent, so its derivative sees the gradients of both together.
Without tangents it is ordinary attention.

Under grad, jvp or vmap PyTorch's dispatcher calls an operator once per active transform, and each rule below answers
one of them: forward mode makes tangents arguments of the operator, reverse mode records a node whose backward is the
backward operator, vmap folds the mapped axis into the batch. A JVP around another derivative is left to plain PyTorch.

Why not PyTorch's public ways. An autograd.Function with a `jvp` computes the value first and the tangent apart, so the
pair is never one pass, its jvp cannot be differentiated by the backward that sees both, and torch.compile drops it
without a word (pytorch 192985). torch.library.register_autograd has no rule for forward mode: the tangent of an
operator would be lost. So one kernel for the dispatcher's key Autograd answers both modes, and it needs private names:
_AutoDispatchBelowAutograd and _after_autograd_keyset to call the next transform (as register_autograd does inside);
_SingleLevelFunction with its switch, because autograd.Function.apply would start all transforms again (as torch.func
does inside); _set_fwd_grad_enabled, because a Function's forward has forward mode switched off for the transforms
further out, too; _compiled_autograd_key, which compiled autograd asks of every Function; _DisableAutocast, because
autocast reaches into operators, and would round float32 matmuls of plain PyTorch; and what `attend` asks. The tests run
every transform on every version of PyTorch that is supported.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from jvp_attention import fallback
from jvp_attention.layout import Results, as_rows, empty_results, empty_rows, nothing
from jvp_attention.shapes import Given

log = logging.getLogger("jvp_attention")
LIBRARY = torch.library.Library("jvp_attention", "FRAGMENT")

Six: TypeAlias = tuple[Tensor, ...]  # Results, or the gradients of q, k, v, dq, dk, dv
GIVEN = (
    "Tensor q, Tensor k, Tensor v, Tensor? dq, Tensor? dk, Tensor? dv, "
    "Tensor? lengths, Tensor? mask, float scale, bool causal"
)
OLDER_VMAP = torch._C._parse_dispatch_key("Batched") or ""  # used by gradcheck and torch.autograd.functional.jacobian
MASK = Given._fields.index("mask")
RESULTS = "Tensor o, Tensor do, Tensor o_residual, Tensor do_residual, Tensor lse, Tensor mu"
FORWARD_ARGUMENTS = f"{GIVEN}, bool keep"  # keep: also the residuals, for a backward
BACKWARD_ARGUMENTS = f"{GIVEN}, {RESULTS}, Tensor? go, Tensor? gdo, bool[] wanted"


def forward(*arguments: Any) -> Six:
    """Compute attention and its derivative along the tangents: `Results`."""
    given, (keep,) = Given.split(arguments)
    if stands_in(given):
        with torch._C._DisableAutocast():
            return tuple(as_rows(x) for x in fallback.forward(given, keep))
    from jvp_attention import launch

    return tuple(launch.run(launch.forward_calls(given, keep)))


def backward(*arguments: Any) -> Six:
    """Compute gradients of q, k, v, dq, dk, dv from those of o and do; `nothing` for those that are not wanted."""
    given, (*results, go, gdo, wanted) = Given.split(arguments)
    if stands_in(given):
        with torch._C._DisableAutocast():
            return tuple(as_rows(x) for x in fallback.backward(given, Results(*results), go, gdo, wanted))
    from jvp_attention import launch

    if gdo is None:  # o does not depend on the tangents: ordinary attention's backward
        given = given.without_tangents()
    found = launch.run(launch.backward_calls(given, Results(*results), go, gdo, wanted))
    return tuple(nothing(given.q) if x is None else x for x in found)


def stands_in(given: Given) -> bool:
    """Return whether plain PyTorch replaces the kernels. The log says why, once: a warning if on a GPU."""
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

    return launch.why_not(q, given.has_tangent)


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _log_once(reason: str, level: int) -> None:
    log.log(level, "plain PyTorch attention stands in: %s", reason)


def attend(given: Given) -> Six:
    """Call the forward operator, or directly its plain PyTorch where the dispatcher would add only overhead."""
    if torch.compiler.is_compiling() or _needs_the_dispatcher(given) or not stands_in(given):
        return FORWARD(*given, False)
    return forward(*given, False)


def _needs_the_dispatcher(given: Given) -> bool:
    """Return whether derivatives, transforms, modes or tensor subclasses make an operator more than its kernel."""
    tensors = [x for x in given if isinstance(x, Tensor)]
    return (
        forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(x) is not Tensor or (x.requires_grad and torch.is_grad_enabled()) for x in tensors)
    )


# Shapes of results, for torch.compile


def _forward_shapes(*arguments: Any) -> Six:
    given, (keep,) = Given.split(arguments)
    return empty_results(given, keep)


def _backward_shapes(*arguments: Any) -> Six:
    (q, k, v, *_), (*_, wanted) = Given.split(arguments)
    return tuple(empty_rows(x) if want else nothing(x) for x, want in zip((q, k, v) * 2, wanted, strict=True))


# Reverse mode


@contextlib.contextmanager
def _all_levels() -> Iterator[None]:
    """Switch derivatives, which are off in an autograd.Function's forward, on again for the outer transforms."""
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


class _Attention(_SingleLevelFunction):
    """The forward operator where a gradient is wanted: saves what the backward needs for the inputs with a gradient."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

    @staticmethod
    def forward(ctx: Any, below: Callable[..., Six], *arguments: Any) -> Six:
        """Call the operator of the next level down, with residuals kept."""
        given, _ = Given.split(arguments)
        with _all_levels():
            results = Results(*below(*given, True))
        *tensors, ctx.scale, ctx.causal = given
        ctx.save_for_backward(*tensors, *results)
        ctx.set_materialize_grads(False)
        constant = [] if any(ctx.needs_input_grad[1:4]) else [results.o]
        ctx.mark_non_differentiable(*constant, *results[2:])
        return results

    @staticmethod
    def backward(ctx: Any, go: Tensor | None, gdo: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        """Call the backward operator for the gradients that are asked for."""
        wanted = list(ctx.needs_input_grad[1:7])
        if gdo is None:  # o does not depend on the tangents
            wanted[3:] = [False] * 3
        found: tuple[Tensor | None, ...] = (None,) * 6
        if any(wanted) and not (go is None and gdo is None):
            q, k, v, dq, dk, dv, lengths, mask, *results = ctx.saved_tensors
            given = Given(q, k, v, dq, dk, dv, lengths, mask, ctx.scale, ctx.causal)
            found = BACKWARD(*given, *results, go, gdo, wanted)
            found = tuple(x if want else None for x, want in zip(found, wanted, strict=True))
        return None, *found, *(None,) * 5


class _Gradients(_SingleLevelFunction):
    """The backward operator where a gradient of its results may be wanted: asking for one raises."""

    _compiled_autograd_key = torch.autograd.Function._compiled_autograd_key

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


# Forward mode


def _unpack(arguments: tuple[Any, ...]) -> tuple[list[Any], list[Tensor | None]]:
    """Separate values and tangents of the transform that the dispatcher is at."""
    values = list(arguments)
    tangents: list[Tensor | None] = [None] * len(arguments)
    for i, x in enumerate(arguments):
        if isinstance(x, Tensor) and x.is_floating_point():
            values[i], tangents[i] = forward_ad.unpack_dual(x, level=0)
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
    given, (keep,) = Given.split(tuple(values))
    if given.has_tangent:
        return _second(fallback.written_out, arguments)
    # PyTorch's rule for a zero-dimensional tensor makes tangents of another dtype (pytorch 160513)
    dq, dk, dv = (None if dx is None else dx.to(given.q.dtype) for dx in tangents[:3])
    dual = given._replace(dq=dq, dk=dk, dv=dv)
    if any(torch._C._dispatch_keys(dx).has(OLDER_VMAP) for dx in (dq, dk, dv) if dx is not None):
        # o is computed without it, since what it maps cannot be given a tangent; the others slice by slice
        _, do, *others = FORWARD(*dual, keep)
        return forward_ad.make_dual(FORWARD(*given, keep)[0], do, level=0), do, *others
    results = Results(*_record(_Attention, below, (*dual, keep)))
    return results._replace(o=forward_ad.make_dual(results.o, results.do, level=0))


def _backward_derivatives(keys: Any, *arguments: Any) -> Six:
    """Answer forward and reverse mode for the backward operator: both are second derivatives."""
    if any(dx is not None for dx in _unpack(arguments)[1]):
        return _second(fallback.gradients_written_out, arguments)
    return _record(_Gradients, _below(BACKWARD, keys), arguments)


def _second(written_out: Callable[..., Sequence[Tensor]], arguments: tuple[Any, ...]) -> Six:
    """Let PyTorch differentiate plain PyTorch, which in torch.compile it cannot always do."""
    _log_once("the kernels know no forward mode around another derivative", logging.WARNING)
    given, others = Given.split(arguments)
    try:
        with torch._C._DisableAutocast():
            return tuple(written_out(given, *others))
    except RuntimeError as error:
        if "INTERNAL ASSERT FAILED" not in str(error):
            raise
        raise NotImplementedError(
            "jvp_attention: no forward mode around another derivative inside torch.compile"
        ) from error


# vmap


def _vmap(operator: Any) -> Callable[..., tuple[Six, tuple[int | None, ...]]]:
    """Make the rule by which an operator answers vmap: the mapped axis is folded into the batch."""

    def rule(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Six, tuple[int | None, ...]]:
        axes_of = dict(zip(Given._fields, in_dims, strict=False))
        q, batch = arguments[0], info.batch_size
        elements = q.shape[0] if axes_of["q"] is None else q.movedim(axes_of["q"], 0).shape[1]

        def fold(x: Any, axis: Any, is_mask: bool) -> Any:  # the axis of a list of flags is a list
            if not isinstance(x, Tensor) or (axis is None and x.ndim == 1 and x.numel() == 0):
                return x
            if axis is None and is_mask and x.shape[0] == 1:
                return x  # the same for every entry
            x = x.expand(batch, *x.shape) if axis is None else x.movedim(axis, 0)
            if is_mask:
                x = x.expand(-1, elements, *x.shape[2:])
            return x.flatten(0, 1)

        folded = [fold(x, axis, i == MASK) for i, (x, axis) in enumerate(zip(arguments, in_dims, strict=True))]
        results = operator(*folded)
        axes = tuple(None if x.ndim == 1 else 0 for x in results)
        unfolded = tuple(x if x.ndim == 1 else x.unflatten(0, (batch, -1)) for x in results)
        return unfolded, axes

    return rule


def _left_alone(function: Callable[..., Six]) -> Callable[..., Six]:
    """Hide a function from Dynamo, which after a graph break traces what eager code calls, kernel launches included."""

    @functools.cache
    def hidden() -> Callable[..., Six]:
        return torch.compiler.disable(function)

    def call(*arguments: Any) -> Six:
        return (hidden() if "torch._dynamo" in sys.modules else function)(*arguments)

    return call


def _register(name: str, arguments: str, function: Callable[..., Six], shapes: Any, derivatives: Any) -> Any:
    """Define an operator by its arguments, its kernels, its results' shapes and its derivatives."""
    qualified = f"{LIBRARY.ns}::{name}"
    LIBRARY.define(f"{name}({arguments}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
    operator = getattr(getattr(torch.ops, LIBRARY.ns), name).default
    LIBRARY.impl(name, _left_alone(function), "CompositeExplicitAutograd")
    LIBRARY.impl(name, derivatives, "Autograd", with_keyset=True)
    torch.library.register_fake(qualified, shapes, lib=LIBRARY)
    torch.library.register_vmap(qualified, _vmap(operator), lib=LIBRARY)
    return operator


FORWARD = _register("forward", FORWARD_ARGUMENTS, forward, _forward_shapes, _forward_derivatives)
BACKWARD = _register("backward", BACKWARD_ARGUMENTS, backward, _backward_shapes, _backward_derivatives)
