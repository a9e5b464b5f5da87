"""Layers that cost no more than they must inside a Jacobian-vector product.

Under torch.func.jvp PyTorch derives every operation's tangent on its own. Where a weight or a constant meets a tangent
it still runs the product rule's empty half, and on small tensors the bookkeeping costs more than the numbers. Each
layer here takes value and tangent apart, applies its own rule, and puts them together again; in a plain call it is the
layer that its name says.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


def unpack_dual(a: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent of a, the tangent None outside a JVP or where a has none.

    The level is named, there being one only: torch.compile would take "no JVP is running", if the first call finds
    none, to hold for the JVPs after it.
    """
    value, tangent = forward_ad.unpack_dual(a, level=0)
    return value, tangent


def has_tangent(a: Tensor) -> bool:
    """Tell whether a is inside a JVP, with a tangent of its own."""
    return unpack_dual(a)[1] is not None


class Linear(nn.Linear):
    """nn.Linear with the tangent rule y' = x' W^T: one product each for value and tangent.

    PyTorch's rule y' = x' W^T + x W'^T runs its second product, forward and backward, though W' is zero: leaving it
    out saves 1 of 3 products forward and 3 of 8 forward and backward. With tangents on the weights this is nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return y = x W^T + b [..., out_features] for x [..., in_features]."""
        value, tangent = unpack_dual(input)
        if tangent is None or has_tangent(self.weight):
            return super().forward(input)
        return forward_ad.make_dual(super().forward(value), F.linear(tangent, self.weight))


def _gelu_and_tangent(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y = x Phi, y' = x' (Phi + x phi), and their slopes in x: Phi + x phi and x' phi (2 - x^2)."""
    phi = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    Phi = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    slope = torch.addcmul(Phi, x, phi)
    return x * Phi, dx * slope, slope, dx * phi * (2 - x.square())


class _GELUAndTangent(torch.autograd.Function):
    """Value and tangent of GELU, x Phi(x) with the distribution function Phi and density phi of N(0, 1).

    Computes and keeps once what PyTorch's rules compute several times over: Phi + x phi, and its slope.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return y, y' and their slopes."""
        return _gelu_and_tangent(x, dx)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and the slopes."""
        ctx.save_for_backward(*inputs, *output[2:])
        ctx.mark_non_differentiable(*output[2:])

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gdy: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
        """Carry the gradients of y and y' back to x and x'."""
        x, dx, slope, dslope = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            slope, dslope = _gelu_and_tangent(x, dx)[2:]
        return torch.addcmul(gy * slope, gdy, dslope), gdy * slope


def gelu(input: Tensor) -> Tensor:
    """Return x Phi(x) (Hendrycks and Gimpel, 1606.08415): torch.nn.functional.gelu, cheaper inside a JVP."""
    value, tangent = unpack_dual(input)
    if tangent is None:
        return F.gelu(value)
    return forward_ad.make_dual(*_GELUAndTangent.apply(value, tangent)[:2])
