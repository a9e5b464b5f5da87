"""Distances between two sets of features: Frechet, and the precision and recall of Kynkaanniemi et al. (2019).

Whose features they are (Inception's for FID, pixels for digits) is the caller's choice.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CHUNK = 1024  # rows of a distance matrix that are held at once

Matrix = NDArray[np.float64]


class Gaussian(NamedTuple):
    """Mean and covariance of features, all that a Frechet distance compares.

    Attributes:
        mean: [D].
        covariance: [D, D], divided by N - 1.
    """

    mean: Matrix
    covariance: Matrix


def gaussian_statistics(features: ArrayLike) -> Gaussian:
    """Compute mean and unbiased covariance of features [N, D], in float64.

    Raises:
        ValueError: fewer than two samples, another shape, or numbers that are not finite.
    """
    features = _features("features", features)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least two samples, got {len(features)}")
    return Gaussian(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)))


def frechet_distance(mu1: Matrix, sigma1: Matrix, mu2: Matrix, sigma2: Matrix) -> float:
    """Compute the squared Frechet distance of Gaussians, |mu1 - mu2|^2 + tr(sigma1 + sigma2 - 2 (sigma1 sigma2)^(1/2)).

    With sigma = R R^T the last trace is the sum of the singular values of R1^T R2: real, symmetric in the two, and
    exact for covariances without full rank (fewer samples than features), where a matrix root of the product is not.
    Means are [D], covariances [D, D], finite, in float64.

    Raises:
        ValueError: a matrix that is no covariance.
    """
    overlap = np.linalg.svd(covariance_root(sigma1).T @ covariance_root(sigma2), compute_uv=False).sum()
    squared = float(np.square(mu1 - mu2).sum() + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap)
    return max(squared, 0.0)  # rounding can leave -1e-13 where the two are equal


def precision_recall(real: ArrayLike, fake: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Compute precision and recall of fake [M, D] against real [N, D] features.

    The support of a set is the union of balls around its points, each reaching to its k-th nearest neighbour in the
    set. Precision is the fraction of fake points in the support of the real ones, recall of real in the fake ones'.

    Raises:
        ValueError: no more than k points in a set, shapes that do not fit, numbers that are not finite.
    """
    real, fake = _features("real", real), _features("fake", fake)
    return _fraction_within(fake, real, _radii(real, k)), _fraction_within(real, fake, _radii(fake, k))


def _features(name: str, features: ArrayLike) -> Matrix:
    """Return features as a float64 matrix [N, D], or raise ValueError."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or 0 in features.shape:
        raise ValueError(f"{name} must be of shape [N, D], got {list(features.shape)}")
    if not np.isfinite(features).all():
        raise ValueError(f"{name} hold numbers that are not finite")
    return features


def covariance_root(sigma: Matrix) -> Matrix:
    """Factor sigma [D, D] as R R^T, R [D, rank]. Eigenvalues that are zero but for rounding count as zero.

    Raises:
        ValueError: a matrix that is no covariance: not symmetric, or with negative eigenvalues.
    """
    if not np.allclose(sigma, sigma.T, rtol=1e-5, atol=1e-8 * np.abs(sigma).max()):
        raise ValueError("a covariance must be symmetric")
    values, vectors = np.linalg.eigh((sigma + sigma.T) / 2)
    if values[0] < -1e-5 * max(values[-1], 0.0) - 1e-30:
        raise ValueError(f"a covariance has no negative eigenvalues; this one has {values[0]:.3g}")
    kept = values > len(values) * np.finfo(np.float64).eps * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _radii(points: Matrix, k: int) -> Matrix:
    """Return the distance [N] of each point [N, D] to its k-th nearest neighbour, itself not counted."""
    from scipy.spatial.distance import cdist  # slow to import, for commands that may only print their help

    chunks = (points[i : i + CHUNK] for i in range(0, len(points), CHUNK))
    rows = (np.partition(cdist(chunk, points), k, axis=1)[:, k] for chunk in chunks)  # place 0 is the point itself
    return np.concatenate(list(rows))


def _fraction_within(points: Matrix, centres: Matrix, radii: Matrix) -> float:
    """Return the fraction of points that lie in at least one ball."""
    from scipy.spatial.distance import cdist

    chunks = (points[i : i + CHUNK] for i in range(0, len(points), CHUNK))
    inside = [(cdist(chunk, centres) <= radii).any(1) for chunk in chunks]
    return float(np.concatenate(inside).mean())
