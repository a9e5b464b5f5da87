"""Networks with derivatives known by hand, and some as people write them, for the tests."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tvm_ref.guidance import Condition
from tvm_ref.shapes import over


class Waves(nn.Module):
    """F(x, t, s) = sin(a x + b t + c s) [+ label * beta], so dF/ds = c cos(...)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (0.7, -1.3, 2.1))
        self.calls = 0

    def phase(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.a * x + self.b * over(t, x) + self.c * over(s, x)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        self.calls += 1
        y = self.phase(x, t, s).sin()
        return y if condition is None else y + over(condition.label * condition.beta, x)

    def ds(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return self.c * self.phase(x, t, s).cos()


class PointData(nn.Module):
    """F(x, t, s) = (x - m) / t: the exact average velocity if all data are the point m (the flow is straight)."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = nn.Parameter(m)

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        return (x - self.m) / over(t, x)


class Net(nn.Module):
    """A network of points that embeds both times, with some layers in the middle."""

    def __init__(self, *layers: nn.Module, rate: float = 1.0) -> None:
        super().__init__()
        self.embed, self.layers, self.out, self.rate = nn.Linear(4, 8), nn.Sequential(*layers), nn.Linear(8, 4), rate

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        y = self.embed(x) + over((3 * self.rate * t).sin(), x) + over((2 * self.rate * (t - s)).cos(), x)
        if condition is not None:
            y = y * over(condition.beta, y) + over(condition.label, y)
        return self.out(self.layers(y.tanh()))


class Applied(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Sine(torch.autograd.Function):
    """A sine that brings its own jvp."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent: Tensor) -> Tensor:
        return tangent * ctx.saved_tensors[0].cos()


def some_times(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """t and s <= t, [n], float64."""
    u = torch.rand(2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return u.max(0).values, u.min(0).values
