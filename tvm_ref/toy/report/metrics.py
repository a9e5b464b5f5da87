"""Measure how far a model is from the exact flow map: errors in standard deviations of the data."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_ref.distances import wasserstein2
from tvm_ref.guidance import Condition
from tvm_ref.sampling import Jump, sample
from tvm_ref.seeding import EVALUATION
from tvm_ref.toy.data.mixture import GaussianMixture

POINTS = 2000  # samples to measure; W2 by exact optimal transport takes up to a second at this size
NFES = (1, 2, 4, 8)
EULER_STEPS = 64  # steps of sampling where no jumps were learned
METRICS = ("paired_rmse", "paired_median", "w2_same_noise", "w2_data", "w2_floor", "low_density")


@dataclass(frozen=True)
class Reference:
    """Reference for every model on a distribution: the same noise, carried by the exact flow.

    Attributes:
        noise: x1 [N, D].
        condition: classes and beta [N], or None.
        exact: psi(x1, 1, 0) [N, D].
        data: N fresh data points (with guidance: fresh noise carried by the exact guided flow).
        floor: W2 between `exact` and `data`: the W2 to data of a perfect model.
        threshold: the data's 1 % quantile of exact log density.
    """

    distribution: GaussianMixture
    noise: Tensor
    condition: Condition | None
    exact: Tensor
    data: Tensor
    floor: float
    threshold: float

    @property
    def guided(self) -> bool:
        """True if the exact samples are those of the guided flow, w other than 1, and so are the data."""
        return self.condition is not None and bool((self.condition.beta != 1).any())


def make_reference(
    distribution: GaussianMixture, *, w: float | None = None, points: int = POINTS, seed: int = 0
) -> Reference:
    """Draw noise and data for evaluation and solve the exact flow.

    Args:
        distribution: the data.
        w: a conditional model's guidance weight; None for a model without classes.
        points: N.
        seed: seed of noise and data.
    """
    generator = torch.Generator().manual_seed(EVALUATION + seed)
    noise, fresh = torch.randn(2, points, distribution.dim, generator=generator, dtype=torch.float64)
    data, label = distribution.sample(points, generator)
    condition = None if w is None else Condition(label, torch.full((points,), 1 / w))
    exact = exact_samples(distribution, noise, condition)
    if w is not None and w != 1:  # no data are guided
        data = exact_samples(distribution, fresh, condition)
    many = distribution.sample(50_000, generator)[0]
    threshold = float(torch.quantile(distribution.log_density(many, torch.zeros(len(many))), 0.01))
    return Reference(distribution, noise, condition, exact, data, wasserstein2(exact, data), threshold)


def exact_samples(distribution: GaussianMixture, noise: Tensor, condition: Condition | None = None) -> Tensor:
    """Carry noise x1 [N, D] to data by the exact flow, psi(x1, 1, 0) [N, D]."""
    return distribution.jump(noise, torch.ones(len(noise)), torch.zeros(len(noise)), condition)


def paired_errors(jump: Jump, reference: Reference, nfe: int) -> tuple[Tensor, Tensor]:
    """Sample by `jump` in nfe steps [N, D], and measure the distances to the exact map of the same noise [N]."""
    samples = sample(jump, reference.noise.float(), nfe, reference.condition).double()
    return samples, (samples - reference.exact).norm(dim=-1)


def low_density(samples: Tensor, reference: Reference) -> float:
    """Return the fraction of samples below the data's 1 % quantile of exact log density: 0.01 for the data themselves.

    It detects bridges between modes and blur, not missing modes.
    """
    log_density = reference.distribution.log_density(samples, torch.zeros(len(samples)))
    return float((log_density < reference.threshold).double().mean())


def evaluate(jump: Jump, reference: Reference, nfe: int) -> dict[str, float]:
    """Measure the metrics of metrics.json for one number of function evaluations.

    paired_rmse, paired_median: distance to the exact map of the same noise (heavy-tailed: noise near the border between
    two modes may end in the wrong one). w2_same_noise: W2 to those exact points, at most paired_rmse, without
    sampling floor. w2_data: W2 to fresh data, to compare with w2_floor. low_density: see the function.
    """
    samples, errors = paired_errors(jump, reference, nfe)
    if not torch.isfinite(samples).all():
        return dict.fromkeys(METRICS, float("inf"))
    return {
        "paired_rmse": float(errors.square().mean().sqrt()),
        "paired_median": float(errors.median()),
        "w2_same_noise": wasserstein2(samples, reference.exact),
        "w2_data": wasserstein2(samples, reference.data),
        "w2_floor": reference.floor,
        "low_density": low_density(samples, reference),
    }


def table(nfe: Mapping[str, Mapping[str, float]]) -> str:
    """Format the metrics of several NFEs as a table."""
    head = " NFE  paired RMSE   median  W2 same noise   W2 data (floor)  low density"
    rows = [
        f"{n:>4} {m['paired_rmse']:>12.3f} {m['paired_median']:>8.3f} {m['w2_same_noise']:>14.3f} "
        f"{m['w2_data']:>8.3f} ({m['w2_floor']:.3f}) {100 * m['low_density']:>10.1f} %"
        for n, m in nfe.items()
    ]
    return "\n".join([head, *rows])
