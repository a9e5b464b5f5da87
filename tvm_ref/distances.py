"""Distances between clouds of points, by POT (Python Optimal Transport)."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import ot
import torch
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """W2 between the empirical measures of x [N, D] and y [M, D]: the exact optimal transport cost, square root taken.

    O(N^3): some seconds at N = M = 2,000.

    Raises:
        ValueError: clouds that are empty, of different dimension, or not finite.
    """
    a, b = _clouds(x, y, "W2")
    cost = ot.emd2([], [], ot.dist(a, b), numItermax=2_000_000)
    return float(np.sqrt(max(cost, 0.0)))


def sliced_wasserstein2(x: Tensor, y: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Sliced W2 between clouds x [N, D] and y [M, D]: W2 on random lines, root mean square over the lines.

    O(projections N log N), for clouds too large for wasserstein2. It never exceeds W2; where the clouds differ by a
    translation it is W2 / sqrt(D), up to the draw of the lines.

    Raises:
        ValueError: see wasserstein2; fewer than one projection.
    """
    a, b = _clouds(x, y, "sliced W2")
    if projections < 1:
        raise ValueError(f"sliced W2 needs at least one projection, got {projections}")
    return float(ot.sliced_wasserstein_distance(a, b, n_projections=projections, seed=seed))


def sinkhorn_divergence(x: Tensor, y: Tensor, regularisation: float = 0.1) -> float:
    """Square root of the Sinkhorn divergence S(x, y) = C(x, y) - (C(x, x) + C(y, y)) / 2 of clouds [N, D] and [M, D].

    C is the squared-distance cost of the transport plan with entropic regularisation, in the units of a squared
    distance; S tends to W2^2 as it falls, and the iterations grow in number. O(N M) time and memory per iteration.

    Raises:
        ValueError: see wasserstein2; a regularisation that is not positive and finite.
    """
    a, b = _clouds(x, y, "the Sinkhorn divergence")
    if not 0 < regularisation < float("inf"):
        raise ValueError(f"the regularisation must be positive and finite, got {regularisation}")
    divergence = ot.bregman.empirical_sinkhorn_divergence(
        a, b, regularisation, method="sinkhorn_log", numIterMax=2000, stopThr=1e-6, warn=False
    )
    return float(np.sqrt(max(float(divergence), 0.0)))


def sampling_floor(
    draw: Callable[[int, torch.Generator], Tensor],
    points: int,
    *,
    repeats: int = 5,
    seed: int = 0,
    distance: Callable[[Tensor, Tensor], float] = wasserstein2,
) -> tuple[float, float]:
    """What a perfect model scores: mean and standard deviation of the distance between two fresh clouds of the data.

    Args:
        draw: called as draw(n, generator), returns data [n, D].
        points: N, the size of both clouds.
        repeats: pairs of clouds.
        seed: of all draws.
        distance: any of this module.

    Raises:
        ValueError: fewer than one repeat.
    """
    if repeats < 1:
        raise ValueError(f"the sampling floor needs at least one repeat, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    values = [distance(draw(points, generator), draw(points, generator)) for _ in range(repeats)]
    return statistics.fmean(values), statistics.pstdev(values)


def _clouds(x: Tensor, y: Tensor, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Both clouds as float64 arrays, checked."""
    a, b = (np.asarray(cloud.detach().cpu(), dtype=np.float64) for cloud in (x, y))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"{name} needs clouds of shape [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{name} needs finite points")
    return a, b
