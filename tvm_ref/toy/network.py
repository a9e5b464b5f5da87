"""The toy's network F(x, t, s, condition): an MLP that predicts the correction to the exact flow of Gaussian data."""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from tvm_ref.guidance import Condition
from tvm_ref.layers import Linear, has_tangent
from tvm_ref.shapes import Sample, Time, over

FREQUENCIES = 4  # sines and cosines that encode each time
FOURIER_FEATURES = 16  # sines and cosines of random projections of x: they let the map turn sharply between modes
CLASS_FEATURES = 8  # size of a class's embedding


def std(t: Time) -> Time:
    """Return the standard deviation of x_t [B] for data of variance 1: sqrt((1 - t)^2 + t^2)."""
    return ((1 - t) ** 2 + t**2).sqrt()


def gaussian_average_velocity(t: Time, s: Time) -> Time:
    """Return c(t, s) [B], where c(t, s) x is the average velocity over [s, t] if the data are N(0, I).

    Their flow map is psi(x, t, s) = x std(s) / std(t), so c = (std(s) / std(t) - 1) / (s - t). As
    std(s)^2 - std(t)^2 = 2 (s - t)(s + t - 1), the pole at s = t cancels.
    """
    std_t, std_s = std(t), std(s)
    return 2 * (s + t - 1) / (std_t * (std_s + std_t))


def gaussian_average_velocity_ds(t: Time, s: Time) -> Time:
    """Return dc/ds [B] of gaussian_average_velocity, with d/ds std(s) = (2 s - 1) / std(s)."""
    std_t, std_s = std(t), std(s)
    scale = 2 / (std_t * (std_s + std_t))  # c = scale (s + t - 1)
    return scale * (1 - (s + t - 1) * (2 * s - 1) / (std_s * (std_s + std_t)))


class Parts(NamedTuple):
    """Parts of F: -m + c(t, s) (x - (1 - t) m) [B, D], 2 - s - t [B, 1], and the MLP's input h."""

    gaussian: Tensor
    fade: Tensor
    h: Tensor


class ToyNetwork(nn.Module):
    """F(x, t, s) = -m + c(t, s) (x - (1 - t) m) + (2 - s - t) MLP(x / std(t), t, t - s, class, beta).

    The first two terms are the flow of N(m, I), with a mean m per class that is learned (data without classes have
    mean zero). Whatever the data, at t = 1 noise tells nothing about them and u(x, 1) = x - m, so the MLP's part fades
    towards s = t = 1. The MLP's last layer and m start at zero: an untrained network is the exact flow map of N(0, I).

    x / std(t) enters as itself and as random Fourier features, times as Fourier features.

    Args:
        dim: D.
        num_classes: C, 0 for a network without classes; label C means "no class".
        width: units per hidden layer.
        depth: number of hidden layers.
    """

    frequencies: Tensor
    projection: Tensor

    def __init__(self, dim: int = 2, num_classes: int = 0, width: int = 64, depth: int = 4):
        super().__init__()
        self.register_buffer("frequencies", math.pi * torch.arange(1, FREQUENCIES + 1), persistent=False)
        # angles of the same size in any dimension
        self.register_buffer("projection", math.sqrt(2 / dim) * torch.randn(dim, FOURIER_FEATURES))
        self.means = nn.Embedding(num_classes + 1, dim) if num_classes else None
        self.classes = nn.Embedding(num_classes + 1, CLASS_FEATURES) if num_classes else None
        inputs = dim + 2 * FOURIER_FEATURES + 4 * FREQUENCIES + (CLASS_FEATURES + 1 if num_classes else 0)
        sizes = [inputs] + [width] * depth
        self.hidden = nn.ModuleList(Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.output = Linear(width, dim)
        for layer in (self.output, self.means):
            if layer is not None:
                nn.init.zeros_(layer.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return F [B, D] for x [B, D], times t and s [B], and classes if the network has them.

        Raises:
            ValueError: a condition for a network without classes, or no condition for one with classes.
        """
        if (condition is None) != (self.classes is None):
            raise ValueError("a network with classes needs a condition, and one without takes none")
        if has_tangent(s) and not has_tangent(x) and not has_tangent(t):  # a JVP in s only, as TVM's
            s, ds = forward_ad.unpack_dual(s)
            gaussian, fade, h = self._with_tangents(self._parts(x, t, s, condition), x, t, s, ds, condition)
        else:
            gaussian, fade, h = self._parts(x, t, s, condition)
        for layer in self.hidden:
            h = nn.functional.gelu(layer(h))  # smooth, as the loss holds a derivative of the network
        return gaussian + fade * self.output(h)  # F = [-m + c (x - (1 - t) m)] + (2 - s - t) MLP(h)

    def _parts(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None) -> Parts:
        z = x / over(std(t), x)  # of variance 1 at every time, so that one set of frequencies suits all
        angle_z, angle_t, angle_g = (
            z @ self.projection, over(t, x) * self.frequencies, over(t - s, x) * self.frequencies
        )  # fmt: skip
        features = [z, angle_z.sin(), angle_z.cos(), angle_t.sin(), angle_t.cos()]
        if condition is not None and self.classes is not None:
            features += [self.classes(condition.label), over(condition.beta, x)]
        h = torch.cat([*features, angle_g.sin(), angle_g.cos()], dim=-1)  # what depends on s comes last
        gaussian = over(gaussian_average_velocity(t, s), x) * self._centred(x, t, condition)
        if condition is not None and self.means is not None:
            gaussian = gaussian - self.means(condition.label)
        return Parts(gaussian, over(2 - s - t, x), h)

    def _centred(self, x: Tensor, t: Tensor, condition: Condition | None) -> Tensor:
        """Return x - (1 - t) m [B, D]."""
        if condition is None or self.means is None:
            return x
        return x - over(1 - t, x) * self.means(condition.label)

    def _with_tangents(
        self, parts: Parts, x: Tensor, t: Tensor, s: Tensor, ds: Tensor, condition: Condition | None
    ) -> Parts:
        """Give the results of _parts the tangents that PyTorch would find, from the few functions of s among them.

        This changes only the time that a step of TVM takes (tvm_ref.layers says why).
        """
        h = parts.h
        sin_g, cos_g = h[:, -2 * FREQUENCIES :].chunk(2, dim=-1)
        rate = -over(ds, x) * self.frequencies  # d angle_g, angle_g = (t - s) frequencies
        constant = h.new_zeros(len(h), h.shape[1] - 2 * FREQUENCIES)
        dh = torch.cat([constant, rate * cos_g, -rate * sin_g], dim=-1)
        d_gaussian = over(gaussian_average_velocity_ds(t, s) * ds, x) * self._centred(x, t, condition)
        d_fade = -over(ds, x)
        tangents = (d_gaussian, d_fade, dh)
        return Parts(*(forward_ad.make_dual(a, tangent) for a, tangent in zip(parts, tangents, strict=True)))
