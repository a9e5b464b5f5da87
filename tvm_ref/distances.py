"""The 2-Wasserstein distance between clouds of points: exact optimal transport, by SciPy and POT."""

import statistics
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tvm_ref.checks import require


def wasserstein2(x: Tensor, y: Tensor) -> float:
    """Compute W2 between the empirical measures of x [N, D] and y [M, D]: the root of the optimal transport cost.

    Where each x lies close to the y in its row, as samples of a model and of the exact flow do, SciPy finds the best
    pairing several times faster than POT finds a plan; elsewhere it is slower. O(N^3): about a second at N = M = 2,000.

    Raises:
        ValueError: clouds that are empty, of different dimension, or not finite.
    """
    a, b = (np.asarray(cloud.detach().cpu(), dtype=np.float64) for cloud in (x, y))
    fit = a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and len(a) > 0 and len(b) > 0
    require(fit, f"W2 needs clouds of shape [N, D] and [M, D], got {list(a.shape)} and {list(b.shape)}")
    require(bool(np.isfinite(a).all() and np.isfinite(b).all()), "W2 needs finite points")
    # an optimal plan between equally many points of equal weight is a pairing
    if len(a) == len(b) and np.square(a - b).sum() < 0.02 * np.square(a - a.mean(0)).sum():
        from scipy.optimize import linear_sum_assignment  # half a second of CPU, which --help should not cost
        from scipy.spatial.distance import cdist

        costs = cdist(a, b, "sqeuclidean")
        return float(np.sqrt(costs[linear_sum_assignment(costs)].mean()))
    import ot

    return float(np.sqrt(max(ot.emd2([], [], ot.dist(a, b), numItermax=2_000_000), 0.0)))


def sampling_floor(
    draw: Callable[[int, torch.Generator], Tensor], points: int, *, repeats: int = 5, seed: int = 0
) -> tuple[float, float]:
    """Measure the score of a perfect model: mean and standard deviation of W2 between two fresh clouds of the data.

    Args:
        draw: called as draw(n, generator), returns data [n, D].
        points: N, the size of both clouds.
        repeats: pairs of clouds.
        seed: seed of all draws.

    Raises:
        ValueError: fewer than one repeat.
    """
    require(repeats >= 1, f"the sampling floor needs at least one repeat, got {repeats}")
    generator = torch.Generator().manual_seed(seed)
    values = [wasserstein2(draw(points, generator), draw(points, generator)) for _ in range(repeats)]
    return statistics.fmean(values), statistics.pstdev(values)
