"""The oracle: a Gaussian mixture, whose exact velocity and exact flow map answer the calls of a trained FlowMap.

For data x0 ~ sum_k w_k N(m_k, sigma^2 I) and noise x1 ~ N(0, I), every x_t = (1 - t) x0 + t x1 is a mixture again,

    p_t = sum_k w_k N((1 - t) m_k, var_t I),    var_t = (1 - t)^2 sigma^2 + t^2,

so density, score, velocity and (by an ODE solve) flow map are known at every time. Nothing here is learned.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.checks import checked_flow, require
from tvm_ref.exact_flow import follow
from tvm_ref.guidance import Condition, guided_velocity
from tvm_ref.shapes import Labels, PerSample, Sample, Time, over

MAX_PAIRS = 2**17  # points x centres held at once: 1 MiB of float64, which fits a core's cache
RK4_STEPS = 48  # an RMS error under 1e-5 on every distribution of this package


class GaussianMixture:
    """Data distribution sum_k w_k N(m_k, sigma^2 I) together with its exact probability flow.

    Args:
        centres: [K, D] means m_k.
        sigma: bandwidth, the standard deviation of every component around its centre.
        weights: [K] positive weights (normalised here); equal by default.
        labels: [K] class of each component, 0 to C - 1, for class-conditional data; label C means "no class".

    Raises:
        ValueError: centres that are not [K, D] or not finite, a sigma that is not positive, weights or labels that
            are not [K].
    """

    def __init__(self, centres: Tensor, sigma: float, weights: Tensor | None = None, labels: Tensor | None = None):
        good = centres.ndim == 2 and len(centres) > 0 and bool(torch.isfinite(centres).all())
        require(good, f"centres must be finite and of shape [K, D], got {tuple(centres.shape)}")
        require(math.isfinite(sigma) and sigma > 0, f"sigma must be positive and finite, got {sigma}")
        weights = torch.ones(len(centres)) if weights is None else weights
        good = all(a is None or len(a) == len(centres) for a in (weights, labels)) and bool((weights > 0).all())
        require(good, f"weights must be {len(centres)} positive numbers, and labels as many")
        self.centres = centres.double()
        self.sigma = float(sigma)
        self.log_weights = (weights.double() / weights.sum()).log()
        self.labels = labels

    @property
    def dim(self) -> int:
        """D, the dimension of the data."""
        return self.centres.shape[1]

    @property
    def time_scale(self) -> float:
        """The time below which the velocity changes fast: there x_t is about as narrow as the components."""
        return 0.7 * self.sigma

    @property
    def num_classes(self) -> int:
        """C, the number of classes; 0 for data without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draw n points x0 [n, D] (float64) and their classes [n], all 0 for data without classes."""
        index = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        return self._around(index, torch.randn(n, self.dim, generator=generator, dtype=torch.float64))

    def from_uniform(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Map numbers of the unit cube, u [n, 1 + D] (float64, in (0, 1)), to what `sample` draws."""
        masses = self.log_weights.exp().cumsum(0)
        index = torch.searchsorted(masses, u[:, 0].contiguous()).clamp_max(len(masses) - 1)
        return self._around(index, torch.special.ndtri(u[:, 1:]))

    def _around(self, index: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        label = torch.zeros_like(index) if self.labels is None else self.labels[index]
        return self.centres[index] + self.sigma * noise, label

    @checked_flow
    def log_density(self, x: Sample, t: Time, label: Labels | None = None) -> PerSample:
        """Return the log density log p_t(x) [B], given the class where `label` [B] is given."""
        return self._by_chunk(self._log_density, x, t, label)

    @checked_flow
    def score(self, x: Sample, t: Time, label: Labels | None = None) -> Sample:
        """Return the score grad_x log p_t(x) [B, D], given the class where `label` [B] is given."""
        return self._by_chunk(self._score, x, t, label)

    @checked_flow
    def velocity_variance(self, x: Sample, t: Time, label: Labels | None = None) -> PerSample:
        """Return E[||v - E[v | x]||^2 | x_t = x] / D [B] for v = x1 - x0; of a class where `label` [B] is given.

        Its mean is the flow-matching loss of the exact velocity E[v | x], the least possible.
        """
        return self._by_chunk(self._velocity_variance, x, t, label)

    @checked_flow
    def velocity_jacobian(self, x: Sample, t: Time, label: Labels | None = None) -> Tensor:
        """Return du/dx [B, D, D], symmetric, of u(x, t) = E[x1 - x0 | x_t = x], given the class where `label` is."""
        return self._by_chunk(self._velocity_jacobian, x, t, label)

    # The calls of FlowMap

    @checked_flow
    def velocity(self, x: Sample, t: Time, condition: Condition | None = None) -> Sample:
        """Return u(x, t) = E[x1 - x0 | x_t = x] [B, D]; guided, w u(x, t, c) + (1 - w) u(x, t) (eq. 13).

        Args:
            x: [B, D] points.
            t: [B] times in [0, 1].
            condition: labels [B] (C means "no class") and beta = 1/w [B]; None for the unconditional velocity.

        Raises:
            ValueError: shapes that do not fit, or times outside [0, 1].
        """
        if condition is None:
            return self._by_chunk(self._velocity, x, t)
        conditional = self._by_chunk(self._velocity, x, t, condition.label)
        if bool((condition.beta == 1).all()):
            return conditional
        return guided_velocity(conditional, self._by_chunk(self._velocity, x, t), condition.beta)

    @checked_flow
    def jump(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Solve for the flow map psi(x, t, s) [B, D] (eq. 2) in float64. Runs both ways: s > t is allowed here."""
        y = follow(lambda y, r: self.velocity(y, r, condition), x.double(), t, s, self.time_scale, RK4_STEPS)
        return y.to(x.dtype)

    def displacement(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Return the net displacement f(x, t, s) = psi(x, t, s) - x [B, D] (eq. 3)."""
        return self.jump(x, t, s, condition) - x

    def displacement_and_terminal_velocity(
        self, x: Sample, t: Time, s: Time, condition: Condition | None = None, *, detach_jvp: bool = False
    ) -> tuple[Sample, Sample]:
        """Return f(x, t, s) and d/ds f = u(psi(x, t, s), s) (eq. 6), both [B, D]; `detach_jvp` changes nothing."""
        y = self.jump(x, t, s, condition)
        return y - x, self.velocity(y, s, condition)

    # Closed forms, for components of centres m [K, D] and log weights [K]

    def _variance(self, t: Tensor) -> Tensor:
        """Return var_t [B], the variance of each component of p_t."""
        return (1 - t) ** 2 * self.sigma**2 + t**2

    def _log_density(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        variance = self._variance(t)
        square = x.square().sum(-1) / variance + self.dim * (2 * math.pi * variance).log()
        return self._log_joint(x, t, m, log_weights).logsumexp(-1) - log_weights.logsumexp(-1) - square / 2

    def _score(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        """Return -(x - (1 - t) E[m | x]) / var_t: [B, D]."""
        mean = self._posterior(x, t, m, log_weights) @ m
        return -(x - over(1 - t, x) * mean) / over(self._variance(t), x)

    def _velocity(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        """Return E[x1 - x0 | x]: [B, D]. Given the component k too, it is a (x - (1 - t) m_k) - m_k."""
        mean = self._posterior(x, t, m, log_weights) @ m
        a = (t - (1 - t) * self.sigma**2) / self._variance(t)  # [B]
        return over(a, x) * (x - over(1 - t, x) * mean) - mean

    def _velocity_variance(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        # given k too, v is Gaussian, of variance sigma^2 / var_t and a mean that has m_k times -t / var_t
        posterior, variance = self._posterior(x, t, m, log_weights), self._variance(t)
        spread = posterior @ m.square().sum(1) - (posterior @ m).square().sum(1)  # of m_k
        return self.sigma**2 / variance + (t / variance) ** 2 * spread.clamp_min(0) / self.dim

    def _velocity_jacobian(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        # given k too, u is a (x - (1 - t) m_k) - m_k; as x moves, d E[m | x] / dx = (1 - t) / var_t Cov(m | x)
        posterior, variance = self._posterior(x, t, m, log_weights), self._variance(t)
        mean = posterior @ m
        covariance = torch.einsum("bk,ki,kj->bij", posterior, m, m) - torch.einsum("bi,bj->bij", mean, mean)
        a, b = (t - (1 - t) * self.sigma**2) / variance, t * (1 - t) / variance**2
        return a[:, None, None] * torch.eye(self.dim, dtype=x.dtype) - b[:, None, None] * covariance

    def _posterior(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        """Return P(k | x_t = x): [B, K]."""
        return self._log_joint(x, t, m, log_weights).softmax(dim=-1)

    def _log_joint(self, x: Tensor, t: Tensor, m: Tensor, log_weights: Tensor) -> Tensor:
        """Return log(w_k) - ||x - (1 - t) m_k||^2 / (2 var_t) without its term in ||x||^2: [B, K].

        The square is multiplied out, so that the whole is one matmul, [B, D + 2] by [D + 2, K].
        """
        k, precision = over(1 - t, x), over(1 / self._variance(t), x)  # [B, 1]
        rows = torch.cat([k * precision * x, -0.5 * k**2 * precision, torch.ones_like(k)], dim=1)
        columns = torch.cat([m, m.square().sum(1, keepdim=True), log_weights[:, None]], dim=1)
        return rows @ columns.T

    def _by_chunk(self, formula: Callable[..., Tensor], x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Apply formula(x, t, centres, log_weights), in float64, to chunks of a batch, each of one class."""
        if label is None:
            return torch.cat(self._chunks(formula, x, t, None)).to(x.dtype)
        require(self.labels is not None, "this mixture has no class labels")
        order, parts = label.argsort(stable=True), []
        for rows in order.split(label.bincount().tolist()):
            if len(rows):
                parts += self._chunks(formula, x[rows], t[rows], int(label[rows[0]]))
        return torch.cat(parts)[order.argsort()].to(x.dtype)

    def _chunks(self, formula: Callable[..., Tensor], x: Tensor, t: Tensor, label: int | None) -> list[Tensor]:
        """Apply a formula for one class (C and None: all) to as many points at a time as MAX_PAIRS allows."""
        everything = label is None or self.labels is None or label == self.num_classes
        member = slice(None) if everything else self.labels == label
        centres, log_weights = self.centres[member], self.log_weights[member]
        size = max(1, MAX_PAIRS // len(centres))
        chunks = zip(x.double().split(size), t.double().split(size), strict=True)
        return [formula(x, t, centres, log_weights) for x, t in chunks]
