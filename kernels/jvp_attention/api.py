"""attention and dual_attention: the kernels where they can run, the reference where they cannot."""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor
from torch._functorch import eager_transforms
from torch.autograd import forward_ad

from jvp_attention import operators, reference
from jvp_attention.layout import zero_rows
from jvp_attention.shapes import Keys, Lengths, Queries, check, default_scale

log = logging.getLogger("jvp_attention")


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
) -> Queries:
    """softmax(scale q k^T) v [B, H, N, D], as scaled_dot_product_attention without dropout and other masks.

    In a plain call this is ordinary attention, forward and backward. Under torch.func.jvp or forward_ad.dual_level it
    is one fused pass for value and tangent, whichever inputs have tangents, and reverse mode through both is one more
    (Terminal Velocity Matching, arXiv 2511.19797, appendix C, equations 75 to 87).

    Args:
        q: [B, H, N, D], D at most 256.
        k: [B, H, M, D].
        v: [B, H, M, D].
        scale: of the logits; 1/sqrt(D) unless given.
        causal: query i sees keys 0 to i, also where N and M differ.
        lengths: [B], int32 or int64: queries of batch element b see keys 0 to lengths[b]-1 only, with causal both
            apply. What lies beyond has no influence, whatever it is, and gradients of zero. Values from 1 to M are
            meant; a length of 0 makes results and gradients zero, others count as the nearest of 0 and M.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit together.
        NotImplementedError: from the kernels, under vmap, a JVP of a JVP or a gradient of a gradient.
    """
    check(q, k, v, lengths=lengths)
    if not kernels_run(q):
        return reference.attention(q, k, v, scale=scale, causal=causal, lengths=lengths)
    (q, dq), (k, dk), (v, dv) = (forward_ad.unpack_dual(x) for x in _autocast(q, k, v))
    if dq is None and dk is None and dv is None:
        return _plain(q, k, v, lengths, default_scale(q, scale), causal)
    o, do = _dual(q, k, v, dq, dk, dv, lengths, default_scale(q, scale), causal)
    return forward_ad.make_dual(o, do)


def dual_attention(
    q: Queries,
    k: Keys,
    v: Keys,
    dq: Queries | None,
    dk: Keys | None,
    dv: Keys | None,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Queries, Queries]:
    """Attention and its derivative along the tangents dq, dk, dv, for those who carry tangents by hand: (o, do).

    What attention computes under torch.func.jvp, without it; a tangent that is None is zero. Arguments and errors are
    those of attention; a tangent has its input's shape and dtype.
    """
    check(q, k, v, (dq, dk, dv), lengths)
    if not kernels_run(q):
        dq, dk, dv = (zero_rows(x) if dx is None else dx for x, dx in zip((q, k, v), (dq, dk, dv), strict=True))
        return reference.dual_attention(q, k, v, dq, dk, dv, scale=scale, causal=causal, lengths=lengths)
    q, k, v = _autocast(q, k, v)
    dq, dk, dv = (dx if dx is None else dx.to(q.dtype) for dx in (dq, dk, dv))
    return _dual(q, k, v, dq, dk, dv, lengths, default_scale(q, scale), causal)


def _plain(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, scale: float, causal: bool) -> Tensor:
    run = operators.plain_forward if torch.compiler.is_compiling() else operators.PlainAttention.apply
    return run(q, k, v, lengths, scale, causal)[0]


def _dual(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling() and eager_transforms.JVP_NESTING > 1:  # it would drop the outer tangents
        raise NotImplementedError("jvp_attention: no forward mode around another derivative (a JVP of a JVP)")
    tangents = (zero_rows(x) if dx is None else dx for x, dx in ((q, dq), (k, dk), (v, dv)))
    run = operators.dual_forward if torch.compiler.is_compiling() else operators.DualAttention.apply
    o, do, *_ = run(q, k, v, *tangents, lengths, scale, causal)
    return o, do


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs in the dtype that autocast wants products in; as they are where it is off."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@torch.compiler.assume_constant_result
def _why_not(device: str, dtype: torch.dtype) -> str:
    """Why the kernels do not run on such tensors; empty if they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the kernels do not take {dtype}"
    if device == "cuda":
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return f"the kernels do not run on the {device} (only in Triton's interpreter, with TRITON_INTERPRET=1)"
    return "Triton's interpreter cannot compute in bfloat16" if dtype == torch.bfloat16 else ""


def kernels_run(q: Tensor) -> bool:
    """Whether the kernels run on tensors such as q. If not, the log says why, once: a warning if q is on a GPU."""
    reason = _why_not(q.device.type, q.dtype)
    if reason and not torch.compiler.is_compiling():
        _log_once(reason, logging.WARNING if q.is_cuda else logging.INFO)
    return not reason


@functools.cache
def _log_once(reason: str, level: int) -> None:
    log.log(level, "plain PyTorch attention stands in, which holds N x M matrices: %s", reason)
