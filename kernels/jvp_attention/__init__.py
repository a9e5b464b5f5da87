"""Fused attention whose Jacobian-vector product is fused and differentiable.

>>> o = attention(q, k, v)                                             # ordinary attention
>>> o, do = torch.func.jvp(attention, (q, k, v), (dq, dk, dv))         # one fused pass for both
>>> loss(o, do).backward()                                             # two launches, or three, for all gradients
"""

import warnings

from jvp_attention import reference
from jvp_attention.api import attention, dual_attention
from jvp_attention.ready import jvp_ready

__version__ = "0.3.0"
__all__ = ["attention", "dual_attention", "jvp_ready", "reference"]

with warnings.catch_warnings():  # PyTorch's first JVP imports these rules, and warns of its own use of torch.jit.script
    warnings.simplefilter("ignore")
    import torch._decomp.decompositions_for_jvp  # noqa: F401
