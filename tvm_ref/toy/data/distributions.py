"""The toy distributions, each a finite Gaussian mixture standardised to zero mean and unit variance per axis."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.cli.errors import require
from tvm_ref.toy.data.mixture import GaussianMixture

Drawn = tuple[Tensor, Tensor | None]  # centres [K, 2] and, if there are classes, labels [K]


def standardise(centres: Tensor, sigma: float) -> Tensor:
    """Shift and scale centres [K, D], per axis, so that the mixture with bandwidth sigma has mean 0 and variance 1."""
    centred = centres.double() - centres.double().mean(0)
    return centred * math.sqrt(1 - sigma**2) / centred.square().mean(0).sqrt()


def polar(radius: Tensor, angle: Tensor) -> Tensor:
    """Place points by radius and angle [N]: [N, 2]."""
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def _middles(n: int) -> Tensor:
    """Return the n midpoints of equal cells of [0, 1]."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def moons() -> Drawn:
    """Place two interleaved half circles; two classes."""
    angle = math.pi * _middles(64)
    upper = polar(torch.ones(64), angle)
    lower = torch.tensor([1.0, 0.5]) - upper
    return torch.cat([upper, lower]), torch.arange(2).repeat_interleave(64)


def circles() -> Drawn:
    """Place two concentric circles; two classes."""
    angle = 2 * math.pi * _middles(96)
    ring = polar(torch.ones(96), angle)
    return torch.cat([ring, 0.5 * ring]), torch.arange(2).repeat_interleave(96)


def eight_gaussians() -> Drawn:
    """Place eight blobs on a circle; eight classes."""
    return polar(torch.ones(8), 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8), torch.arange(8)


def checkerboard() -> Drawn:
    """Fill the eight dark squares of a 4 x 4 board."""
    cell = torch.cartesian_prod(_middles(8), _middles(8))  # [64, 2]
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])  # [8, 2]
    return (corner[:, None] + cell).flatten(0, 1), None


def two_spirals() -> Drawn:
    """Wind two interleaved spirals of one and a half turns."""
    turn = 3 * math.pi * _middles(192).sqrt()
    arm = polar(turn, turn)
    return torch.cat([arm, -arm]), None


def pinwheel() -> Drawn:
    """Bend five arms around the origin."""
    normal = math.sqrt(2) * torch.erfinv(2 * _middles(16) - 1)
    across = math.sqrt(2) * torch.erfinv(2 * _middles(3) - 1)
    along, lateral = torch.cartesian_prod(1 + 0.3 * normal, 0.05 * across).unbind(-1)  # [48] each
    arms = [
        polar((along**2 + lateral**2).sqrt(), torch.atan2(lateral, along) + 0.25 * along.exp() + 2 * math.pi * k / 5)
        for k in range(5)
    ]
    return torch.cat(arms), None


def swiss_roll() -> Drawn:
    """Wind one spiral of one and a half turns, seen from above."""
    angle = 1.5 * math.pi * (1 + 2 * _middles(192))
    return polar(angle, angle), None


DISTRIBUTIONS: dict[str, tuple[Callable[[], Drawn], float]] = {  # name: (centres and labels, bandwidth sigma)
    "moons": (moons, 0.1),
    "circles": (circles, 0.1),
    "eight_gaussians": (eight_gaussians, 0.1),
    "checkerboard": (checkerboard, 0.07),
    "two_spirals": (two_spirals, 0.07),
    "pinwheel": (pinwheel, 0.07),
    "swiss_roll": (swiss_roll, 0.07),
}


def make_distribution(name: str) -> GaussianMixture:
    """Make the named distribution of DISTRIBUTIONS, standardised.

    Raises:
        ValueError: an unknown name.
    """
    require(name in DISTRIBUTIONS, f"unknown distribution '{name}'; choose one of {', '.join(DISTRIBUTIONS)}")
    draw, sigma = DISTRIBUTIONS[name]
    centres, labels = draw()
    return GaussianMixture(standardise(centres, sigma), sigma, labels=labels)
