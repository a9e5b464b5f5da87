"""Fused attention whose Jacobian-vector product is fused and differentiable.

>>> o = attention(q, k, v)                                             # ordinary attention
>>> o, do = torch.func.jvp(attention, (q, k, v), (dq, dk, dv))         # one fused pass for both
>>> loss(o, do).backward()                                             # and one more for all gradients
"""

from jvp_attention import reference
from jvp_attention.api import attention, dual_attention

__all__ = ["attention", "dual_attention", "reference"]
