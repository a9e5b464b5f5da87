"""PyTorch's functions, rewritten so that gradients through a JVP are right and absent tangents cost nothing.

Each takes the arguments of the function that it stands in for. PyTorch's own rules fail in two ways:

- `layer_norm`, `instance_norm`, `batch_norm`, `linalg.solve`, `tensorsolve`, `det`, `slogdet` and `logdet` have a
  tangent that reads results of the forward which reverse mode treats as constants: value and tangent are right, the
  gradient through the tangent is silently wrong. Here they are written out in functions whose rules are right, so they
  are right at every order.
- A product where only one factor has a tangent, such as a layer's input but not its weights, is also computed with the
  other's zero tangent: 3 products forward and 8 with the backward, where 2 and 6 suffice.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import TransformType, peek_interpreter_stack
from torch._functorch.pyfunctorch import coerce_cinterpreter
from torch.autograd import forward_ad

from jvp_attention.api import attention
from jvp_attention.shapes import LARGEST_HEAD

Function: TypeAlias = Callable[..., Tensor]
GELU_BACKWARD = torch.ops.aten.gelu_backward.default  # g'(x) times a tensor


def tangents_are_hidden() -> bool:
    """Return whether the innermost transform is vmap or grad: then only outer levels know which tensors have tangents.

    Uses private functions of PyTorch, because there are no public ones; torch.compile can trace them.
    """
    if not torch._C._are_functorch_transforms_active():
        return False
    return coerce_cinterpreter(peek_interpreter_stack()).key() != TransformType.Jvp


def unpack_dual(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent of x, the tangent None where x has none.

    Passes level=0 explicitly: otherwise torch.compile would specialise on "no JVP is running" after a first plain call.
    """
    value, tangent = forward_ad.unpack_dual(x, level=0)
    return value, tangent


def has_tangent(x: Any) -> bool:
    """Return whether x is a tensor with a tangent."""
    return isinstance(x, Tensor) and unpack_dual(x)[1] is not None


def product(function: Function, a: Tensor, b: Tensor, **options: Any) -> Tensor:
    """Compute f(a, b), linear in either: its tangent is f(da, b) or f(a, db) where only one of the two has one."""
    if tangents_are_hidden() or has_tangent(a) == has_tangent(b):
        return function(a, b, **options)
    (a, da), (b, db) = unpack_dual(a), unpack_dual(b)
    tangent = function(a, db, **options) if da is None else function(da, b, **options)
    return forward_ad.make_dual(function(a, b, **options), tangent)


def affine(
    function: Function, input: Tensor, weight: Tensor, bias: Tensor | None = None, *sizes: Any, **options: Any
) -> Tensor:
    """Compute a linear layer or convolution: its tangent is that of the product, without the bias."""
    if tangents_are_hidden() or not has_tangent(input) or has_tangent(weight) or has_tangent(bias):
        return function(input, weight, bias, *sizes, **options)
    x, dx = unpack_dual(input)
    return forward_ad.make_dual(
        function(x, weight, bias, *sizes, **options), function(dx, weight, None, *sizes, **options)
    )


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    """Normalise the last axes to mean 0 and variance 1."""
    y = standardised(x, tuple(range(-len(normalized_shape), 0)), eps)
    if weight is not None:
        y = y * weight
    y = y if bias is None else y + bias
    # as in PyTorch: autocast runs it in float32, except on the CPU
    return y if x.device.type != "cpu" and torch.is_autocast_enabled(x.device.type) else y.to(x.dtype)


def instance_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel of each sample; with running statistics as PyTorch does.

    Raises:
        NotImplementedError: running statistics that would be updated.
    """
    if not use_input_stats:
        return F.instance_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    _refuse_statistics(running_mean, "instance_norm")
    return _per_channel(standardised(x, tuple(range(2, x.ndim)), eps), weight, bias, x.dtype)


def group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Call PyTorch's group_norm, whose JVP before version 2.12 takes contiguous inputs only."""
    return F.group_norm(input.contiguous(), num_groups, weight, bias, eps)


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise each channel over the batch; in evaluation, with running statistics, as PyTorch does.

    Raises:
        NotImplementedError: running statistics that would be updated.
    """
    if not training and running_mean is not None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    _refuse_statistics(running_mean, "batch_norm")
    return _per_channel(standardised(x, (0, *range(2, x.ndim)), eps), weight, bias, x.dtype)


def standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Return (x - mean) / sqrt(variance + eps) over some axes, in float32 at least."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(axes, keepdim=True) + eps)


def _per_channel(y: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    shape = (-1, *(1,) * (y.ndim - 2))
    if weight is not None:
        y = y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)).to(dtype)


def _refuse_statistics(running_mean: Tensor | None, name: str) -> None:
    if running_mean is not None:
        raise NotImplementedError(
            f"{name} updates its running statistics in the forward, and no JVP runs through that; take a norm without "
            "them (track_running_stats=False, GroupNorm, RMSNorm), or evaluation mode"
        )


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """Solve A X = B, or X A = B, from the LU decomposition, whose rules are right."""
    LU, pivots = torch.linalg.lu_factor(A)
    if B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1]):  # what PyTorch takes for vectors
        return torch.linalg.lu_solve(LU, pivots, B[..., None], left=left)[..., 0]
    return torch.linalg.lu_solve(LU, pivots, B, left=left)


def tensorsolve(A: Tensor, B: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Solve for X [A.shape[B.ndim:]] in tensordot(A, X, X.ndim) = B, as a matrix equation."""
    if dims:
        A = A.movedim(dims, tuple(range(-len(dims), 0)))
    return solve(A.reshape(B.numel(), -1), B.flatten()).reshape(A.shape[B.ndim :])


def det(A: Tensor) -> Tensor:
    """Compute the determinant as the product of the LU decomposition's diagonal, and the sign of its swaps.

    Raises:
        RuntimeError: a singular matrix, whose LU decomposition has no tangent; slogdet and logdet raise it, too.
    """
    diagonal, sign = _diagonal(A)
    return sign * diagonal.prod(-1)


def slogdet(A: Tensor) -> Any:
    """Compute sign and logarithm of the determinant."""
    diagonal, sign = _diagonal(A)
    Result: Any = torch.return_types.linalg_slogdet  # type: ignore[attr-defined]
    return Result((sign * diagonal.sgn().prod(-1), diagonal.abs().log().sum(-1)))


def logdet(A: Tensor) -> Tensor:
    """Compute the logarithm of the determinant, NaN where that is negative."""
    sign, logarithm = slogdet(A)
    return torch.where(sign < 0, torch.nan, logarithm)


def _diagonal(A: Tensor) -> tuple[Tensor, Tensor]:
    LU, pivots = torch.linalg.lu_factor(A)
    swaps = (pivots != torch.arange(1, A.shape[-1] + 1, device=A.device)).sum(-1)
    return LU.diagonal(dim1=-2, dim2=-1), (1 - 2 * (swaps % 2)).to(A.dtype)


def softmax(function: Function, input: Tensor, dim: int | None = None, *args: Any, **options: Any) -> Tensor:
    """Compute the softmax p of x, whose tangent is p (dx - sum(p dx)).

    PyTorch's rule computes exp(x - max(x)) again, and its gradient compares x with its maximum: where torch.compile
    rounds the two to bfloat16 differently, no element is equal, and the gradient is NaN.
    """
    if dim is None or tangents_are_hidden():
        return function(input, dim, *args, **options)
    x, dx = unpack_dual(input)
    p = function(x, dim, *args, **options)
    if dx is None:
        return p
    weighted = p * dx
    return forward_ad.make_dual(p, (weighted - p * weighted.sum(dim, keepdim=True)).to(p.dtype))


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Compute PyTorch's GELU; in its tanh form, whose second derivative PyTorch takes some 35 passes for, by fewer."""
    if approximate != "tanh" or torch.compiler.is_compiling() or tangents_are_hidden() or not has_tangent(input):
        return F.gelu(input, approximate=approximate)
    x, dx = unpack_dual(input)
    return forward_ad.make_dual(F.gelu(x, approximate="tanh"), _TanhGeluTangent.apply(x, dx))


class _TanhGeluTangent(torch.autograd.Function):
    """Map x and dx to g'(x) dx, where g(x) = x (1 + tanh(a (x + b x^3))) / 2; where it is detached, nothing is kept."""

    @staticmethod
    def forward(x: Tensor, dx: Tensor) -> Tensor:
        return GELU_BACKWARD(dx, x, approximate="tanh")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy_bar: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients g'' dx dy_bar and g' dy_bar."""
        x, dx = ctx.saved_tensors
        a, b = math.sqrt(2 / math.pi), 0.044715
        square = x * x
        tanh = torch.tanh(x * (a + a * b * square))
        slope = a + 3 * a * b * square  # of the tanh's argument
        # 1 - tanh^2 is 1 / cosh^2, which PyTorch takes from cosh, its slowest function
        second = (1 - tanh * tanh) * (slope * (2 - x * tanh * slope) - a)
        return second * dx * dy_bar, GELU_BACKWARD(dy_bar, x, approximate="tanh")


def glu(input: Tensor, dim: int = -1) -> Tensor:
    """Compute a * sigmoid(b) of the halves a, b of the input."""
    a, b = input.chunk(2, dim)
    return a * b.sigmoid()


def hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    """Compute a ramp from 0 at -3 to 1 at 3."""
    y = F.relu6(input + 3) / 6
    return input.copy_(y) if inplace else y


def refused(function: Function, instead: str, *args: Any, **kwargs: Any) -> Any:
    """Call a function whose gradient through a JVP is wrong; raise and name an alternative if there is a JVP.

    Raises:
        NotImplementedError: an argument that has a tangent.
    """
    if any(map(has_tangent, (*args, *kwargs.values()))):
        raise NotImplementedError(f"PyTorch's {function.__name__} is wrong under a differentiated JVP; use {instead}")
    return function(*args, **kwargs)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call `attention`; write it out where attention does not go: additive masks, dropout, other shapes, second grads.

    Raises:
        ValueError: a mask that is given together with is_causal.
    """
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention takes attn_mask or is_causal, not both")
    fits = query.ndim == key.ndim == value.ndim == 4 and key.shape == value.shape
    fits = fits and query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] <= LARGEST_HEAD
    fits = fits and (query.shape[1] == key.shape[1] or enable_gqa) and 0 not in (*query.shape, *key.shape)
    mask = attn_mask
    if mask is not None and fits:
        fits = mask.dtype == torch.bool and mask.ndim <= 4
        mask = mask.broadcast_to(*(1,) * (4 - mask.ndim), *mask.shape[:-2], query.shape[2], key.shape[2])
    if fits and not dropout_p and not tangents_are_hidden():
        return attention(query, key, value, scale=scale, causal=is_causal, mask=mask)
    return written_out_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def written_out_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    repeat_heads: bool,
) -> Tensor:
    """Compute dropout(softmax(scale q k^T + mask)) v, where a query that sees no key has a result of zero."""
    if repeat_heads:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    logits = product(torch.matmul, q * (q.shape[-1] ** -0.5 if scale is None else scale), k.mT)
    if causal:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
        blind = (logits == float("-inf")).all(-1, keepdim=True)
        weights = softmax(torch.softmax, logits.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    else:
        weights = softmax(torch.softmax, logits, -1)
    return product(torch.matmul, F.dropout(weights, dropout).to(v.dtype), v)
