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

# PyTorch's first JVP of a process uses torch.jit.script itself, and warns its caller of it
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
