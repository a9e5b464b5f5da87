"""Flows known in closed form, and expectations that are sums, for the tests of objectives."""

import math

import numpy as np
import torch
from torch import Tensor, nn

from tvm_ref.flow_map import FlowMap
from tvm_ref.guidance import Condition
from tvm_ref.objectives import Objective
from tvm_ref.shapes import over
from tvm_ref.time_samplers import Times

NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(8))
WEIGHTS = WEIGHTS / math.sqrt(
    2 * math.pi
)  # sum(WEIGHTS * g(NODES)) = E g(z), z ~ N(0, 1), for polynomials g up to z^15


class GaussianData(nn.Module):
    """The exact average velocity if the data are N(m, sigma^2 I), plus sum_j theta_j phi_j(x, t, s) at theta = 0.

    x_t is N((1 - t) m, a(t)^2 I) with a(t)^2 = (1 - t)^2 sigma^2 + t^2, and the flow keeps y = (x - (1 - t) m) / a(t).
    So psi - x = (t - s) m + (a(s) - a(t)) y; in the division by s - t the pole cancels.
    The gradient with respect to theta at theta = 0 is the functional gradient, paired with the phi_j.
    """

    def __init__(self, m: float = 0.7, sigma: float = 0.4):
        super().__init__()
        self.m, self.sigma = m, sigma
        self.theta = nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def std(self, t: Tensor) -> Tensor:
        return ((1 - t) ** 2 * self.sigma**2 + t**2).sqrt()

    def exact(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        a, b = self.std(t), self.std(s)
        c = ((s + t) * (1 + self.sigma**2) - 2 * self.sigma**2) / (a * (a + b))
        return over(c, x) * (x - over(1 - t, x) * self.m) - self.m

    def forward(self, x: Tensor, t: Tensor, s: Tensor, condition: Condition | None = None) -> Tensor:
        t_, s_ = over(t, x), over(s, x)
        phi = torch.stack([torch.ones_like(x), x, (x + t_ - 2 * s_).sin(), t_ * s_ + x * s_], dim=0)
        return self.exact(x, t, s) + (over(self.theta, phi) * phi).sum(0)

    def data_given(self, x: Tensor, t: Tensor) -> Tensor:
        """Nodes [K, B] of x0 given x_t = x [B]; they go with WEIGHTS."""
        variance = self.std(t) ** 2
        mean = self.m + (1 - t) * self.sigma**2 / variance * (x - (1 - t) * self.m)
        return mean + self.sigma * t / variance.sqrt() * NODES[:, None]


def expected_gradient(objective: Objective, data: GaussianData, x: Tensor, times: Times, target: FlowMap) -> Tensor:
    """The gradient with respect to data.theta of the objective, in expectation over (x0, x1) given x_t = x [B]."""
    x0 = data.data_given(x, times.t)  # [K, B]
    x1 = (x - (1 - times.t) * x0) / times.t
    many = Times(*(a.expand_as(x0).flatten() for a in times))
    terms = objective(x0.reshape(-1, 1), x1.reshape(-1, 1), many, target=target)
    loss = (WEIGHTS[:, None] * terms.total.view_as(x0)).sum(0).mean()
    return torch.autograd.grad(loss, data.theta)[0]


class TwoPoints:
    """Data of two points [2, D] with given masses: given x_t, the velocity is one of two, with known probabilities."""

    def __init__(self, points: Tensor, masses: tuple[float, float]):
        self.points, self.masses = points.double(), torch.tensor(masses, dtype=torch.float64)

    def posterior(self, x: Tensor, t: Tensor) -> Tensor:
        """P(x0 = point k given x_t = x) [B, 2]."""
        square = (x[:, None] - over(1 - t, x)[:, None] * self.points).square().sum(-1)
        return (self.masses.log() - square / over(2 * t**2, square)).softmax(-1)

    def velocities(self, x: Tensor, t: Tensor) -> Tensor:
        """The two possible velocities x1 - x0 = (x - x0) / t [B, 2, D]."""
        return (x[:, None] - self.points) / over(t, x)[:, None]

    def velocity(self, x: Tensor, t: Tensor, condition: Condition | None = None) -> Tensor:
        """u(x, t) [B, D]."""
        return (self.posterior(x, t)[..., None] * self.velocities(x, t)).sum(1)


def probes(n: int = 12, seed: int = 0) -> tuple[Tensor, Times]:
    """Points x [n] and times with .3 <= s <= t <= .98 or so, s' = t; no two alike."""
    generator = torch.Generator().manual_seed(seed)
    x, a, b = torch.randn(3, n, dtype=torch.float64, generator=generator)
    t, s = 0.4 + 0.58 * torch.sigmoid(torch.maximum(a, b)), 0.38 * torch.sigmoid(torch.minimum(a, b))
    return x, Times(t, s, t.clone())
