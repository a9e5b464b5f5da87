"""attention and dual_attention.

The route from here to a kernel and back:

    attention                   api.py        check the inputs
    FORWARD                     operators.py  PyTorch's dispatcher, once per transform that is under way:
      _vmap                                     folds a mapped axis into the batch
      _forward_derivatives                      makes tangents arguments; _Attention saves for a backward
      forward                                 the kernels, or fallback.py where they cannot run
        launch.forward_calls    launch.py     allocate the results, choose tiles
        forward_kernel          forward.py
    _Attention.backward         operators.py  when gradients come: which of the six are wanted
      BACKWARD, backward                      as above
        query_kernel, key_kernel  backward.py
"""

import torch
from torch import Tensor

from jvp_attention.operators import FORWARD
from jvp_attention.shapes import Keys, Lengths, Mask, Queries, check, default_scale


def attention(
    q: Queries,
    k: Keys,
    v: Keys,
    *,
    scale: float | None = None,
    causal: bool = False,
    lengths: Lengths | None = None,
    mask: Mask | None = None,
) -> Queries:
    """Compute softmax(scale q k^T) v [B, H, N, D], as scaled_dot_product_attention does without dropout or bias.

    In a plain call this is ordinary attention, forward and backward. Under torch.func.jvp or forward_ad.dual_level it
    is one fused pass for value and tangent, whichever inputs have tangents, and reverse mode through both is one more
    (Terminal Velocity Matching, arXiv 2511.19797, appendix C, equations 75 to 87).

    Args:
        q: [B, H, N, D], D at most 256.
        k: [B, G, M, D]; G divides H, and each head of keys serves H/G heads of q that follow each other.
        v: [B, G, M, D].
        scale: of the logits; 1/sqrt(D) unless given. A number: a tensor is multiplied into q instead.
        causal: query i sees keys 0 to i, also where N and M differ.
        lengths: [B], int32 or int64: queries of batch element b see keys 0 to lengths[b]-1 only. What lies beyond has
            no influence, whatever it is, and gradients of zero. Values from 1 to M are meant; others count as the
            nearest of 0 and M.
        mask: [B or 1, H or 1, N, M], boolean: queries see the keys where it is true. Where causal, lengths and mask
            meet, all apply; a query that sees no key has a result, a tangent and gradients of zero.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit together.
        NotImplementedError: from the backward pass, if gradients of gradients are asked for.
    """
    check(q, k, v, (), scale, lengths, mask)
    q, k, v = _autocast(q, k, v)
    return FORWARD(q, k, v, None, None, None, lengths, mask, default_scale(q, scale), causal, False)[0]


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
    mask: Mask | None = None,
) -> tuple[Queries, Queries]:
    """Compute attention and its derivative along the tangents dq, dk, dv: (o, do), for tangents carried by hand.

    What attention computes under torch.func.jvp, without it; a tangent that is None is zero. Arguments and errors are
    those of attention; a tangent has its input's shape and dtype.
    """
    check(q, k, v, (dq, dk, dv), scale, lengths, mask)
    q, k, v = _autocast(q, k, v)
    dq, dk, dv = (dx if dx is None else dx.to(q.dtype) for dx in (dq, dk, dv))
    o, do, *_ = FORWARD(q, k, v, dq, dk, dv, lengths, mask, default_scale(q, scale), causal, False)
    return o, torch.zeros_like(o) if dq is None and dk is None and dv is None else do


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the inputs in the dtype that autocast wants products in; as they are where it is off."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return q.to(dtype), k.to(dtype), v.to(dtype)
