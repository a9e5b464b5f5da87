"""Derivatives by differences of values alone, in float64: what a JVP and the gradient through it are judged by."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

STEP = 1e-3  # five points: errors of STEP^4 and, of a difference of differences, of 1e-16 / STEP^2


def difference(function: Callable[[float], Tensor]) -> Tensor:
    """The derivative of a function of one number at 0."""
    at = {k: function(k * STEP) for k in (-2, -1, 1, 2)}
    return (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * STEP)


def randn_like(x: Tensor, seed: int) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))


def loss_of(y: Tensor, dy: Tensor) -> Tensor:
    """Some loss of value and tangent."""
    return (randn_like(y, 7) * (y + 1).sin() * dy).sum()


def assert_right(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    moving: Sequence[int] = (0,),
    parameters: Sequence[Tensor] = (),
    mode: Callable | None = None,
    tolerance: float = 1e-7,
    call: Callable[[Callable], Callable] = lambda f: f,
) -> None:
    """Hold value, tangent and all gradients of a function under `mode` to differences of its values without it.

    The inputs named by `moving` have tangents. `call` may compile what computes value and tangent.
    """
    inputs = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    tangents = {i: randn_like(inputs[i], i).requires_grad_() for i in moving}

    def at(step: float, xs: Sequence[Tensor]) -> Tensor:
        return function(*(x + step * tangents[i] if i in tangents else x for i, x in enumerate(xs)))

    def dual(xs: Sequence[Tensor], dxs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        def of_moving(*values: Tensor) -> Tensor:
            given = dict(zip(moving, values, strict=True))
            return function(*(given.get(i, x) for i, x in enumerate(xs)))

        with mode():
            return torch.func.jvp(of_moving, tuple(xs[i] for i in moving), tuple(dxs))

    y, dy = call(dual)(inputs, [tangents[i] for i in moving])
    with torch.no_grad():
        torch.testing.assert_close(y, function(*inputs), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(dy, difference(lambda e: at(e, inputs)), rtol=tolerance, atol=tolerance)
    variables = [x for x in (*inputs, *tangents.values(), *parameters) if x.is_floating_point()]
    found = torch.autograd.grad(loss_of(y, dy), variables, allow_unused=True, materialize_grads=True)
    for k, (variable, gradient) in enumerate(zip(variables, found, strict=True)):
        direction = randn_like(variable, 100 + k)
        start = variable.detach().clone()

        def moved(e: float, variable=variable, direction=direction, start=start) -> Tensor:
            variable.data.copy_(start + e * direction)
            value = loss_of(function(*inputs), difference(lambda e: at(e, inputs)))
            variable.data.copy_(start)
            return value

        with torch.no_grad():
            exact, scale = difference(moved), gradient.norm() * direction.norm()
        error = float((gradient * direction).sum() - exact)
        assert abs(error) <= tolerance * max(1.0, float(scale)), f"variable {k}: {error:.1e} of {float(scale):.1e}"


def double(network: nn.Module, seed: int = 0) -> nn.Module:
    """A network in float64 whose parameters are random, zeros included."""
    network = network.double()
    with torch.no_grad():
        for k, p in enumerate(network.parameters()):
            p.add_(0.1 * randn_like(p, seed + k))
    return network
