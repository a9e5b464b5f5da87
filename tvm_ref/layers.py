"""Layers with a cheaper Jacobian-vector product.

Under torch.func.jvp PyTorch derives every operation's tangent on its own. Where a weight or a constant meets a tangent
it still computes the term of the product rule that is zero, and on small tensors the bookkeeping costs more than the
numbers. Each layer here separates value and tangent, applies its own rule and recombines them; in a plain call it is
PyTorch's layer of the same name.
"""

import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


def unpack_dual(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent of a, the tangent None outside a JVP or where a has none.

    Passes level=0 explicitly: otherwise torch.compile would specialise on "no JVP is running" after a first plain call.
    """
    value, tangent = forward_ad.unpack_dual(a, level=0)
    return value, tangent


def has_tangent(a: Tensor) -> bool:
    """Return whether a has a tangent in the current JVP."""
    return unpack_dual(a)[1] is not None


class Linear(nn.Linear):
    """nn.Linear with the tangent rule y' = x' W^T: one matmul each for value and tangent.

    PyTorch's rule y' = x' W^T + x W'^T runs its second matmul, forward and backward, though W' is zero: leaving it
    out saves 1 of 3 matmuls forward and 2 of 8 forward and backward. With tangents on the weights this is nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return y = x W^T + b [..., out_features] for x [..., in_features]."""
        value, tangent = unpack_dual(input)
        # a plain call, or one that differentiates along the weights as well: PyTorch's own rule
        if tangent is None or has_tangent(self.weight):
            return super().forward(input)
        # y' = x' W^T: the bias is constant along the tangent
        return forward_ad.make_dual(super().forward(value), F.linear(tangent, self.weight))
