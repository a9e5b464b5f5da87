"""The oracle: a Gaussian mixture, whose exact velocity and exact flow map answer the calls of a trained FlowMap.

For data x0 ~ sum_k w_k N(m_k, sigma^2 I) and noise x1 ~ N(0, I), every x_t = (1 - t) x0 + t x1 is a mixture again,

    p_t = sum_k w_k N((1 - t) m_k, var_t I),    var_t = (1 - t)^2 sigma^2 + t^2,

so density, score, velocity and (by an ODE solve) flow map are known at every time. Nothing here is learned.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from tvm_ref.guidance import Condition
from tvm_ref.objectives import Flow
from tvm_ref.shapes import Labels, PerSample, Sample, Time, check_batch, check_times, over

MAX_PAIRS = 2**17  # points x centres held at once: 1 MiB of float64, which a core's cache holds
RK4_STEPS = 48  # an RMS error under 1e-5 on every distribution of this package


def rk4_step(velocity: Callable[[Sample, Time], Sample], x: Sample, z: Time, step: Time, scale: float) -> Sample:
    """Carry x [B, ...] from z [B] to z + step [B] along dx/dt = velocity(x, t), where t = scale sinh(z).

    One step of RK4 in z. Equal steps in z are fine steps in t below `scale`, where the velocity changes fast.
    """

    def slope(x: Tensor, z: Tensor) -> Tensor:  # dx/dz = velocity(x, scale sinh z) scale cosh z
        return over(scale * z.cosh(), x) * velocity(x, (scale * z.sinh()).clamp(0, 1))

    h = over(step, x)
    k1 = slope(x, z)
    k2 = slope(x + h / 2 * k1, z + step / 2)
    k3 = slope(x + h / 2 * k2, z + step / 2)
    k4 = slope(x + h * k3, z + step)
    return x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)


def exact_path(oracle: Flow, x_t: Sample, s: Tensor, scale: float, condition: Condition | None = None) -> Tensor:
    """Solve for Y_s = psi(x_t, t, s) (eq. 2) at every time s [S] from t = s[-1]: [S, N, ...]; a step per interval."""
    path = [x_t]
    for z, z_next in itertools.pairwise((s / scale).asinh().flip(0)):
        y = path[-1]
        now, step = (y.new_full((len(y),), float(a)) for a in (z, z_next - z))
        path.append(rk4_step(lambda y, time: oracle.velocity(y, time, condition), y, now, step, scale))
    return torch.stack(path[::-1])


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
        if centres.ndim != 2 or len(centres) == 0 or not torch.isfinite(centres).all():
            raise ValueError(f"centres must be finite and of shape [K, D], got {tuple(centres.shape)}")
        if not (math.isfinite(sigma) and sigma > 0):
            raise ValueError(f"sigma must be positive and finite, got {sigma}")
        weights = torch.ones(len(centres)) if weights is None else weights
        if weights.shape != centres.shape[:1] or not (weights > 0).all():
            raise ValueError(f"weights must be {len(centres)} positive numbers")
        if labels is not None and labels.shape != centres.shape[:1]:
            raise ValueError(f"labels must be of shape [{len(centres)}], got {tuple(labels.shape)}")
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

    def log_density(self, x: Sample, t: Time, label: Labels | None = None) -> PerSample:
        """Return the log density log p_t(x) [B], given the class where `label` [B] is given."""
        check_batch(x, t)

        def piece(x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
            variance = self._variance(t)
            square = x.square().sum(-1) / variance + self.dim * (2 * math.pi * variance).log()
            return self._log_joint(x, t, centres, log_weights).logsumexp(-1) - log_weights.logsumexp(-1) - square / 2

        return self._by_piece(piece, x, t, label)

    def score(self, x: Sample, t: Time, label: Labels | None = None) -> Sample:
        """Return the score grad_x log p_t(x) [B, D] = -(x - (1 - t) E[m | x]) / var_t."""
        check_batch(x, t)

        def piece(x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
            mean = self._posterior_mean(x, t, centres, log_weights)
            return -(x - over(1 - t, x) * mean) / over(self._variance(t), x)

        return self._by_piece(piece, x, t, label)

    def velocity_variance(self, x: Sample, t: Time, label: Labels | None = None) -> PerSample:
        """Return E[||v - E[v | x]||^2 | x_t = x] / D [B] for v = x1 - x0; of a class where `label` [B] is given.

        Its mean is the flow-matching loss of the exact velocity E[v | x], the least of all.
        """
        check_batch(x, t)

        def piece(x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
            # given k too, v is Gaussian, of variance sigma^2 / var_t and a mean that has m_k times -t / var_t
            share, variance = self._log_joint(x, t, centres, log_weights).softmax(dim=-1), self._variance(t)
            spread = share @ centres.square().sum(1) - (share @ centres).square().sum(1)  # of m_k
            return self.sigma**2 / variance + (t / variance) ** 2 * spread.clamp_min(0) / self.dim

        return self._by_piece(piece, x, t, label)

    # The calls of FlowMap ---------------------------------------------------------------------------------------

    def velocity(self, x: Sample, t: Time, condition: Condition | None = None) -> Sample:
        """Return u(x, t) = E[x1 - x0 | x_t = x] [B, D]; guided, w u(x, t, c) + (1 - w) u(x, t) (eq. 13).

        Args:
            x: [B, D] points.
            t: [B] times in [0, 1].
            condition: labels [B] (C means "no class") and beta = 1/w [B]; None for the unconditional velocity.

        Raises:
            ValueError: shapes that do not fit, or times outside [0, 1].
        """
        check_batch(x, t)
        check_times(t)
        if condition is None:
            return self._velocity(x, t, None)
        guided = self._velocity(x, t, condition.label)
        if bool((condition.beta == 1).all()):
            return guided
        w = over(1 / condition.beta, x)
        return w * guided + (1 - w) * self._velocity(x, t, None)

    def jump(self, x: Sample, t: Time, s: Time, condition: Condition | None = None) -> Sample:
        """Solve for the flow map psi(x, t, s) [B, D] (eq. 2) in float64. Runs both ways: s > t is allowed here."""
        check_batch(x, t, s)
        check_times(t)
        check_times(s)
        z, z_end = ((time.double() / self.time_scale).asinh() for time in (t, s))
        step, y = (z_end - z) / RK4_STEPS, x.double()
        for i in range(RK4_STEPS):
            y = rk4_step(lambda y, time: self.velocity(y, time, condition), y, z + i * step, step, self.time_scale)
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

    # Closed forms -----------------------------------------------------------------------------------------------

    def _velocity(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        def piece(x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
            mean = self._posterior_mean(x, t, centres, log_weights)
            a = (t - (1 - t) * self.sigma**2) / self._variance(t)  # [B]
            return over(a, x) * (x - over(1 - t, x) * mean) - mean

        return self._by_piece(piece, x, t, label)

    def _variance(self, t: Tensor) -> Tensor:
        return (1 - t) ** 2 * self.sigma**2 + t**2

    def _log_joint(self, x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
        """Return log(w_k) - ||x - (1 - t) m_k||^2 / (2 var_t), less the term ||x||^2 / (2 var_t): [B, K].

        The square is multiplied out, so that all of it is one matrix product, [B, D + 2] by [D + 2, K].
        """
        k, precision = over(1 - t, x), over(1 / self._variance(t), x)  # [B, 1]
        rows = torch.cat([k * precision * x, -0.5 * k**2 * precision, torch.ones_like(k)], dim=1)
        columns = torch.cat([centres, centres.square().sum(1, keepdim=True), log_weights[:, None]], dim=1)
        return rows @ columns.T

    def _posterior_mean(self, x: Tensor, t: Tensor, centres: Tensor, log_weights: Tensor) -> Tensor:
        """Return E[m | x_t = x]: [B, D]."""
        return self._log_joint(x, t, centres, log_weights).softmax(dim=-1) @ centres

    def _components(self, label: int | None) -> tuple[Tensor, Tensor]:
        """Return centres and log weights of a class's components; of all for the label C and for None."""
        if label is not None and self.labels is None:
            raise ValueError("this mixture has no class labels")
        if label is None or self.labels is None or label == self.num_classes:
            return self.centres, self.log_weights
        member = self.labels == label
        return self.centres[member], self.log_weights[member]

    def _by_piece(self, function: Callable[..., Tensor], x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """Apply function(x, t, centres, log_weights) to pieces of a batch, each of one class and few pairs."""
        if label is None:
            return torch.cat(self._pieces(function, x, t, None)).to(x.dtype)
        order, parts = label.argsort(stable=True), []
        for rows in order.split(label.bincount().tolist()):
            if len(rows):
                parts += self._pieces(function, x[rows], t[rows], int(label[rows[0]]))
        return torch.cat(parts)[order.argsort()].to(x.dtype)

    def _pieces(self, function: Callable[..., Tensor], x: Tensor, t: Tensor, label: int | None) -> list[Tensor]:
        centres, log_weights = self._components(label)
        size = max(1, MAX_PAIRS // len(centres))
        batches = zip(x.double().split(size), t.double().split(size), strict=True)
        return [function(x, t, centres, log_weights) for x, t in batches]
