"""Distances between clouds of points, by POT (Python Optimal Transport)."""

import numpy as np
import ot
from torch import Tensor


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """W2 between the empirical measures of x [N, D] and y [M, D]: the exact optimal transport cost, square root taken.

    O(N^3): some seconds at N = M = 2,000.

    Raises:
        ValueError: clouds that are empty, of different dimension, or not finite.
    """
    a, b = (np.asarray(cloud.detach().cpu(), dtype=np.float64) for cloud in (x, y))
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not len(a) or not len(b):
        raise ValueError(f"W2 needs clouds of shape [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("W2 needs finite points")
    cost = ot.emd2([], [], ot.dist(a, b), numItermax=2_000_000)
    return float(np.sqrt(max(cost, 0.0)))
