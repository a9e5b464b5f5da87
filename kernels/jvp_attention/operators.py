"""The kernels as operators of PyTorch: opaque to torch.compile, handed plain dense tensors.

Forward and backward, plain and dual. The dual forward is one node with two outputs, so its derivative sees the
gradients of value and tangent together. Derivatives are stated twice from one formula: registered with the operators
for torch.compile, and as autograd.Functions for eager mode, which refuse what they do not know (vmap, a JVP of a JVP)
instead of dropping it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from jvp_attention.layout import empty_low, empty_numbers, empty_rows, zero_rows

Run: TypeAlias = tuple[Callable[..., tuple[Tensor, ...]], Callable[..., tuple[Tensor, ...]]]  # backward, plain and dual


@torch.library.custom_op("jvp_attention::plain_forward", mutates_args=())
def plain_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Attention: o [B, H, N, D] and lse [B, H, N]."""
    from jvp_attention import launch

    o, lse = launch.run(launch.forward_calls((q, k, v), None, scale, causal, lengths))
    return o, lse


@torch.library.custom_op("jvp_attention::plain_backward", mutates_args=())
def plain_backward(
    go: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    o: Tensor,
    o_low: Tensor | None,
    lse: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of o."""
    from jvp_attention import launch

    saved = launch.Saved(o, lse, o_low=o_low)
    gq, gk, gv = launch.run(launch.backward_calls((q, k, v), None, saved, go, None, scale, causal, lengths))
    return gq, gk, gv


@torch.library.custom_op("jvp_attention::dual_forward", mutates_args=())
def dual_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention and its derivative along a tangent: o, do, what rounding took from both, lse and mu [B, H, N]."""
    from jvp_attention import launch

    o, do, o_low, do_low, lse, mu = launch.run(launch.forward_calls((q, k, v), (dq, dk, dv), scale, causal, lengths))
    return o, do, o_low, do_low, lse, mu


@torch.library.custom_op("jvp_attention::dual_backward", mutates_args=())
def dual_backward(
    go: Tensor,
    gdo: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    lengths: Tensor | None,
    o: Tensor,
    do: Tensor,
    o_low: Tensor,
    do_low: Tensor,
    lse: Tensor,
    mu: Tensor,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, dq, dk, dv from those of o and do."""
    from jvp_attention import launch

    saved = launch.Saved(o, lse, do, o_low, do_low, mu)
    calls = launch.backward_calls((q, k, v), (dq, dk, dv), saved, go, gdo, scale, causal, lengths)
    gq, gk, gv, gdq, gdk, gdv = launch.run(calls)
    return gq, gk, gv, gdq, gdk, gdv


@plain_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return empty_rows(q), empty_numbers(q)


@plain_backward.register_fake
def _(go: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_rows(q), empty_rows(k), empty_rows(v)


@dual_forward.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_rows(q), empty_rows(q), empty_low(q), empty_low(q), empty_numbers(q), empty_numbers(q)


@dual_backward.register_fake
def _(
    go: Tensor, gdo: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_rows(q), empty_rows(k), empty_rows(v), empty_rows(q), empty_rows(k), empty_rows(v)


def _saver(count: int) -> Callable[..., None]:
    """A setup_context that keeps all tensors of an operator, so many with lengths, and its scale and causal."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[:count], *output)
        ctx.scale, ctx.causal = inputs[count:]
        ctx.set_materialize_grads(False)

    return save


def _plain_gradients(run: Run, ctx: Any, go: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of the inputs of plain_forward, by `run`, its backward operator."""
    if go is None:
        return (None,) * 6
    q, k, v, lengths, o, lse = ctx.saved_tensors
    return *run[0](go, q, k, v, lengths, o, None, lse, ctx.scale, ctx.causal), None, None, None


def _dual_gradients(run: Run, ctx: Any, go: Tensor | None, gdo: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    """Of the inputs of dual_forward; with the gradient of o alone the plain backward does."""
    if go is None and gdo is None:
        return (None,) * 9
    q, k, v, dq, dk, dv, lengths, o, do, o_low, do_low, lse, mu = ctx.saved_tensors
    if gdo is None:
        return *run[0](go, q, k, v, lengths, o, o_low, lse, ctx.scale, ctx.causal), *(None,) * 6
    go = zero_rows(gdo) if go is None else go
    given = (go, gdo, q, k, v, dq, dk, dv, lengths, o, do, o_low, do_low, lse, mu, ctx.scale, ctx.causal)
    return *run[1](*given), None, None, None


def _no_second(ctx: Any, *gradients: Any) -> Any:
    raise NotImplementedError("jvp_attention: no double backward (gradients of attention's gradients)")


def _no_vmap(*_: Any) -> Any:
    raise NotImplementedError("jvp_attention: no vmap; use the batch axis")


class _Eager(torch.autograd.Function):
    """An operator in eager mode; what torch.func may ask of it and it does not know raises."""

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        """Refused: attention takes its own tangents apart, so these belong to a derivative around another one."""
        raise NotImplementedError("jvp_attention: no forward mode around another derivative (a JVP of a JVP)")

    vmap = staticmethod(_no_vmap)


class _PlainBackward(_Eager):
    forward = staticmethod(lambda *given: plain_backward(*given))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_no_second)


class _DualBackward(_Eager):
    forward = staticmethod(lambda *given: dual_backward(*given))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_no_second)


EAGER_BACKWARD: Run = (_PlainBackward.apply, _DualBackward.apply)
COMPILED_BACKWARD: Run = (plain_backward, dual_backward)


class PlainAttention(_Eager):
    """The operator plain_forward in eager mode: (o, lse) of q, k, v, lengths, scale, causal."""

    forward = staticmethod(lambda *given: plain_forward(*given))
    setup_context = staticmethod(_saver(4))
    backward = staticmethod(partial(_plain_gradients, EAGER_BACKWARD))


class DualAttention(_Eager):
    """The operator dual_forward in eager mode: (o, do, ...) of q, k, v, dq, dk, dv, lengths, scale, causal."""

    forward = staticmethod(lambda *given: dual_forward(*given))
    setup_context = staticmethod(_saver(7))
    backward = staticmethod(partial(_dual_gradients, EAGER_BACKWARD))


plain_forward.register_autograd(partial(_plain_gradients, COMPILED_BACKWARD), setup_context=_saver(4))
dual_forward.register_autograd(partial(_dual_gradients, COMPILED_BACKWARD), setup_context=_saver(7))
for _operator in (plain_backward, dual_backward):
    _operator.register_autograd(_no_second, setup_context=lambda ctx, inputs, output: None)
for _operator in (plain_forward, dual_forward, plain_backward, dual_backward):
    _operator.register_vmap(_no_vmap)
