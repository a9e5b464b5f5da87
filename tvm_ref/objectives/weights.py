"""Weights that some objectives put on their squared residuals: adaptive ones, and learned ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tvm_ref.checks import require
from tvm_ref.shapes import PerSample, Time

Weight = Callable[[PerSample, Time, Time], PerSample]  # called as weight(square, t, s): squares [B] to losses [B]


def unweighted(square: PerSample, t: Time, s: Time) -> PerSample:
    """Return the square itself."""
    return square


@dataclass(frozen=True)
class AdaptiveWeight:
    """square / sg(square + eps)^power, the adaptive weight of MeanFlow (2505.13447, sec. 4.3) and of its successors.

    Where the residual contains the random velocity v, so does the weight, and the minimiser is no longer the flow map
    unless power is 0: in a few dimensions the bias is large, see README.md in this folder. Squares are means over
    elements here, as everywhere in this package; MeanFlow's are sums over D elements, and its code has eps = .01, which
    is eps = .01 / D here (CIFAR-10: power .75, 1e-3 / D). The default, 1e-3 of means, is ours.

    Raises:
        ValueError: a negative power, an eps that is not positive.
    """

    power: float = 1.0
    eps: float = 1e-3

    def __post_init__(self) -> None:
        good = self.power >= 0 and self.eps > 0
        require(good, f"power must not be negative and eps be positive, got {self.power} and {self.eps}")

    def __call__(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return losses [B] of squares [B]."""
        # sg: the weight is a number, so that gradients keep their direction
        return square / (square.detach() + self.eps) ** self.power


class LearnedWeight(nn.Module):
    """exp(-w(t, s)) square + w(t, s) with a learned w, as in self-distillation (2505.18825, its code's calc_weight).

    For each (t, s) the best w is log E[square], so that all jumps have the same weight. w is a small MLP that starts at
    zero; its weights are the objective's, not the model's.

    Args:
        width: units of its hidden layer.
    """

    def __init__(self, width: int = 32):
        super().__init__()
        self.hidden = nn.Linear(3, width)
        self.output = nn.Linear(width, 1)
        # w = 0 at first: the loss starts as the plain square
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, square: PerSample, t: Time, s: Time) -> PerSample:
        """Return losses [B] of squares [B] at times [B]."""
        times = torch.stack([t, s, t - s], dim=-1).to(self.hidden.weight.dtype)
        w = self.output(torch.tanh(self.hidden(times)))[:, 0]
        return torch.exp(-w) * square + w
