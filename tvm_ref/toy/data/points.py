"""Your own points as a distribution: a Gaussian around each, standardised, and the units that they came in."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import require
from tvm_ref.shapes import Sample
from tvm_ref.toy.data.distributions import standardise
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.table import check, read_table

MAX_CENTRES = 4096  # most of the user's points that are kept; the exact flow costs points x centres
MIN_BANDWIDTH = 0.03  # below it the exact flow is too stiff for the solver's grid
MAX_BANDWIDTH = 0.5  # widest that is tried; a wider one must be given
FEW = 500  # points; below, the report says that the bandwidth blurs them
FAR = 10.0  # interquartile ranges from the median, beyond which a point is called an outlier


@dataclass(frozen=True)
class Units:
    """Units of the data: a model learns standardised x, and the data in their own units are mean + scale x, per axis.

    Attributes:
        mean: the data's mean, per axis.
        scale: size of one unit of x in the own units, per axis.
        columns: names of the axes.
    """

    mean: tuple[float, ...] = (0.0, 0.0)
    scale: tuple[float, ...] = (1.0, 1.0)
    columns: tuple[str, ...] = ("x", "y")

    def restore(self, x: Sample) -> Sample:
        """Turn standardised points [N, D] into points in the data's own units [N, D] (float64)."""
        return self._tensor(self.mean) + self._tensor(self.scale) * x.double()

    def standardise(self, points: Sample) -> Sample:
        """Turn points in the data's own units [N, D] into standardised ones [N, D] (float64)."""
        return (points.double() - self._tensor(self.mean)) / self._tensor(self.scale)

    def _tensor(self, numbers: tuple[float, ...]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float64)


class OwnPoints(GaussianMixture):
    """The user's points as a distribution: a Gaussian around each, standardised.

    If there are more than 4,096, a fixed random subset is kept, because the exact flow costs points x centres.

    Args:
        points: [N, 2] in their own units.
        bandwidth: width of the Gaussians in standard deviations of the data; None: the likeliest one (outliers
            left out).
        columns: names of the two axes.
        left_out: number of rows with gaps and of outliers that were left out.

    Attributes:
        points: [N, 2] the points that are kept, in their own units.
        units: converts to the points' own units and back.
        summary: the contents of data.json.

    Raises:
        ValueError: a bandwidth outside [0.03, 1).
    """

    def __init__(
        self,
        points: Tensor,
        bandwidth: float | None = None,
        columns: tuple[str, ...] = ("x", "y"),
        left_out: tuple[int, int] = (0, 0),
    ):
        kept = points
        if len(points) > MAX_CENTRES:
            kept = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:MAX_CENTRES]]
        chosen = bandwidth is None
        if bandwidth is None:
            near = torch.ones(len(kept), dtype=torch.bool)
            near[far_points(kept)] = False  # a single such point would lead to the widest bandwidth
            bandwidth = likely_bandwidth(standardise(kept, 0.0)[near])
        good = MIN_BANDWIDTH <= bandwidth < 1
        require(good, f"--bandwidth must lie in [{MIN_BANDWIDTH}, 1) standard deviations of the data; got {bandwidth}")
        super().__init__(standardise(kept, bandwidth), bandwidth)
        self.points = kept
        mean, deviation = kept.double().mean(0), kept.double().std(0, correction=0)
        scale = deviation / math.sqrt(1 - bandwidth**2)  # the Gaussians widen the data, which have variance 1 with them
        self.units = Units(tuple(mean.tolist()), tuple(scale.tolist()), columns)
        outliers = far_points(points)
        self.summary: dict[str, Any] = {
            "points": len(points),
            "used": len(kept),
            "columns": list(columns),
            "mean": mean.tolist(),
            "standard_deviation": deviation.tolist(),
            "bandwidth": bandwidth,
            "bandwidth_is": "the likeliest (leave-one-out)" if chosen else "as given",
            "outliers": len(outliers),
            "farthest": points[outliers[0]].tolist() if len(outliers) else None,
            "left_out": dict(zip(("rows with gaps", "outliers"), left_out, strict=True)),
        }

    def describe(self) -> list[str]:
        """Describe in a few lines how the points were prepared, and what is odd about them."""
        s = self.summary
        deviation, width = (
            " and ".join(f"{factor * d:.4g}" for d in s["standard_deviation"]) for factor in (1, s["bandwidth"])
        )
        mean = " and ".join(map(_rounded, s["mean"], s["standard_deviation"]))
        used = f", of which a random {s['used']:,} are used" if s["used"] < s["points"] else ""
        far, many = ", ".join(f"{a:g}" for a in s["farthest"] or ()), s["outliers"]
        tried = s["bandwidth_is"] != "as given" and s["bandwidth"] in (MIN_BANDWIDTH, MAX_BANDWIDTH)
        warnings = {
            f"that is at the end of what is tried, {MIN_BANDWIDTH} to {MAX_BANDWIDTH}; choose a --bandwidth": tried,
            f"{s['used']} points are few: the model learns them blurred by that bandwidth": s["used"] < FEW,
            f"{many:,} point{'s lie' if many > 1 else ' lies'} far from the others, the farthest at ({far}): they "
            "stretch the scale, and what is left may look like a blob; if they are errors, leave them out by "
            "--drop-outliers": many > 0,
        }
        left_out = ", ".join(f"{what} ({n:,})" for what, n in s["left_out"].items() if n)
        return [
            f"{s['points']:,} points{used}; mean {mean}, standard deviation {deviation} ({', '.join(s['columns'])})",
            f"bandwidth {s['bandwidth']:.3g} standard deviations, {s['bandwidth_is']}: {width} in your units",
            *([f"left out: {left_out}"] if left_out else []),
            *(f"warning: {text}" for text, applies in warnings.items() if applies),
        ]


def _rounded(value: float, deviation: float) -> str:
    """Write a mean to about a thousandth of its standard deviation."""
    return f"{round(value, 3 - math.floor(math.log10(deviation))) + 0.0:.15g}"  # + 0.0: no "-0"


def far_points(points: Tensor) -> Tensor:
    """Find the points [N, D] over 10 interquartile ranges from the median on some axis: their indices, farthest first.

    An axis of which half the values are equal has no such range and is skipped.
    """
    low, median, high = np.quantile(points.numpy(), (0.25, 0.5, 0.75), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(high > low, np.abs(points.numpy() - median) / (high - low), 0.0).max(1)
    far = np.flatnonzero(distance > FAR)
    return torch.from_numpy(far[np.argsort(-distance[far], kind="stable")])


def likely_bandwidth(points: Tensor) -> float:
    """Choose the bandwidth, of 40 from 0.03 to 0.5, under which each point of [N, D] is likeliest given the others.

    This is the leave-one-out likelihood of a kernel density estimate. Every fourth is tried first, then those next to
    the best.
    """
    square = torch.cdist(points, points).square().fill_diagonal_(math.inf)
    candidates = np.geomspace(MIN_BANDWIDTH, MAX_BANDWIDTH, 40).tolist()
    candidates[0], candidates[-1] = MIN_BANDWIDTH, MAX_BANDWIDTH  # to the last bit

    def log_likelihood(h: float) -> float:
        rows = [(part / (-2 * h**2)).logsumexp(1) for part in square.split(32)]  # small enough for a core's cache
        return float(torch.cat(rows).mean()) - points.shape[1] * math.log(h)  # up to a constant

    i = candidates.index(max(candidates[::4], key=log_likelihood))
    return float(max(candidates[max(0, i - 3) : i + 4], key=log_likelihood))


def units_of(distribution: GaussianMixture) -> Units:
    """Return the units of own points; those of other distributions are the standardised ones."""
    return distribution.units if isinstance(distribution, OwnPoints) else Units()


def load_points(
    path: Path, bandwidth: float | None = None, columns: Sequence[str] | None = None, drop_outliers: bool = False
) -> OwnPoints:
    """Load the user's own points, optionally without far_points; for errors see read_table and OwnPoints."""
    points, names, gaps = read_table(path, columns)
    far = far_points(points).tolist() if drop_outliers else []
    kept = np.delete(points.numpy(), far, axis=0)
    check(path, kept, f", besides {len(far)} outliers")
    return OwnPoints(torch.from_numpy(kept), bandwidth, names, (gaps, len(far)))
