"""attention and dual_attention.

The route from here to a kernel and back:

    attention                     api.py        check the inputs
    attend                        operators.py  plain PyTorch at once where there is neither kernel nor derivative
    FORWARD                                     PyTorch's dispatcher, once per active transform:
      _vmap                                       folds a mapped axis into the batch
      _forward_derivatives                        makes tangents arguments; _Attention saves for a backward
      forward                                   the kernels, or fallback.py where they cannot run
        launch.forward_calls      launch.py     allocate the results, choose tiles
        forward_kernel            forward.py
    _Attention.backward           operators.py  when gradients come: which of the six are wanted
      BACKWARD, backward                        as above
        query_kernel, key_kernel  backward.py
"""

import torch

from jvp_attention.operators import attend
from jvp_attention.shapes import Given, Keys, Lengths, Mask, Queries, check_and_cast


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
        scale: factor of the logits; 1/sqrt(D) unless given. A number; multiply a tensor into q instead.
        causal: query i sees keys 0 to i, also where N and M differ.
        lengths: [B], int32 or int64: queries of batch element b see keys 0 to lengths[b]-1 only. Keys beyond have
            no influence, whatever their values, and gradients of zero. Give values from 1 to M; others are clamped
            to [0, M].
        mask: boolean, broadcast to [B, H, N, M]: queries see the keys where it is true. Where causal, lengths and mask
            meet, all apply; a query that sees no key has a result, a tangent and gradients of zero.

    Raises:
        TypeError, ValueError: dtypes, devices or shapes that do not fit together, or a scale that is not finite.
        NotImplementedError: from the backward pass, if gradients of gradients are asked for.
    """
    given = check_and_cast(Given(q, k, v, None, None, None, lengths, mask, scale, causal))  # type: ignore[arg-type]
    return attend(given)[0]


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

    The same as attention under torch.func.jvp; a tangent that is None is zero. Other arguments and errors are
    those of attention; a tangent has its input's shape and dtype.
    """
    given = check_and_cast(Given(q, k, v, dq, dk, dv, lengths, mask, scale, causal))  # type: ignore[arg-type]
    o, do, *_ = attend(given)
    return o, do if given.has_tangent else torch.zeros_like(o)
