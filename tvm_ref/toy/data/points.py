"""Your own points: read a table of two columns, standardise it, choose a bandwidth, and tell what was done.

A table is a .npy file, or text: separated by commas, semicolons, tabs or blanks, with or without a header line, with
decimal commas where they do not separate.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import UserError, first_line
from tvm_ref.toy.data.distributions import standardise
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.units import Units

MAX_CENTRES = 4096  # of the user's own points; the exact flow costs points x centres
MIN_BANDWIDTH = 0.03  # below it the exact flow is too stiff for the solver's grid
MAX_BANDWIDTH = 0.5  # that is tried; a wider one must be asked for
FEW = 500  # points, below which it is said what the bandwidth does to them
FAR = 10.0  # interquartile ranges from the median, beyond which a point is called an outlier
TEXT = (".csv", ".tsv", ".txt", ".dat")


class OwnPoints(GaussianMixture):
    """The user's points as a distribution: a Gaussian around each, standardised.

    Of more than 4,096 points a fixed random subset is kept, as the exact flow costs points x centres.

    Args:
        points: [N, 2] in their own units.
        bandwidth: width of the Gaussians in standard deviations of the data; None: the likeliest one (outliers
            left out).
        columns: names of the two axes.

    Attributes:
        points: [N, 2] those that are kept, in their own units.
        units: the way back to the points' own units.
        summary: what data.json holds.

    Raises:
        ValueError: a bandwidth outside [0.03, 1).
    """

    def __init__(self, points: Tensor, bandwidth: float | None = None, columns: tuple[str, ...] = ("x", "y")):
        kept = points
        if len(points) > MAX_CENTRES:
            kept = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:MAX_CENTRES]]
        chosen = bandwidth is None
        if bandwidth is None:
            near = torch.ones(len(kept), dtype=torch.bool)
            near[far_points(kept)] = False  # one such point alone would ask for the widest
            bandwidth = likely_bandwidth(standardise(kept, 0.0)[near])
        if not MIN_BANDWIDTH <= bandwidth < 1:
            raise UserError(
                f"--bandwidth must lie in [{MIN_BANDWIDTH}, 1), in standard deviations of the data; got {bandwidth}"
            )
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
        }

    def describe(self) -> list[str]:
        """Say in a few lines what was made of the points, and what is odd about them."""
        s = self.summary
        deviation, width = (
            " and ".join(f"{factor * d:.4g}" for d in s["standard_deviation"]) for factor in (1, s["bandwidth"])
        )
        mean = " and ".join(map(_rounded, s["mean"], s["standard_deviation"]))
        used = f", of which a random {s['used']:,} are used" if s["used"] < s["points"] else ""
        lines = [
            f"{s['points']:,} points{used}; mean {mean}, standard deviation {deviation} ({', '.join(s['columns'])})",
            f"bandwidth {s['bandwidth']:.3g} standard deviations, {s['bandwidth_is']}: {width} in your units",
        ]
        if s["bandwidth_is"] != "as given" and s["bandwidth"] == MAX_BANDWIDTH:
            lines.append(
                "warning: that is the widest that is tried; points that few or that spread may need a wider --bandwidth"
            )
        if s["bandwidth_is"] != "as given" and s["bandwidth"] == MIN_BANDWIDTH:
            lines.append("warning: that is the narrowest there is; the points would be likelier under a narrower one")
        if s["used"] < FEW:
            lines.append(
                f"warning: {s['used']} points are few: the model learns them blurred by that bandwidth, not the points "
                "themselves"
            )
        if s["outliers"]:
            far = ", ".join(f"{a:g}" for a in s["farthest"])
            many = "1 point lies" if s["outliers"] == 1 else f"{s['outliers']:,} points lie"
            lines.append(
                f"warning: {many} far from the others, the farthest at ({far}): they stretch the scale, and what is "
                "left may look like a blob; leave them out if they are errors"
            )
        return lines


def _rounded(value: float, deviation: float) -> str:
    """Write a mean to about a thousandth of its standard deviation."""
    return f"{round(value, 3 - math.floor(math.log10(deviation))) + 0.0:.15g}"  # + 0.0: no "-0"


def far_points(points: Tensor) -> Tensor:
    """Find the points [N, D] over 10 interquartile ranges from the median on some axis: their indices, farthest first.

    An axis of which half the values are equal has no such range, and is not judged.
    """
    low, median, high = np.quantile(points.numpy(), (0.25, 0.5, 0.75), axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = np.where(high > low, np.abs(points.numpy() - median) / (high - low), 0.0).max(1)
    far = np.flatnonzero(distance > FAR)
    return torch.from_numpy(far[np.argsort(-distance[far], kind="stable")])


def likely_bandwidth(points: Tensor) -> float:
    """Choose the bandwidth, of 40 from 0.03 to 0.5, under which each point of [N, D] is likeliest given the others.

    (Leave-one-out likelihood of a kernel density estimate.) Every fourth is tried, and then those around the best.
    """
    square = torch.cdist(points, points).square().fill_diagonal_(math.inf)
    candidates = np.geomspace(MIN_BANDWIDTH, MAX_BANDWIDTH, 40)
    candidates[[0, -1]] = MIN_BANDWIDTH, MAX_BANDWIDTH  # to the last bit
    scores: dict[int, float] = {}

    def best_of(indices: range) -> int:
        for i in indices:
            if i not in scores:
                rows = [(part / (-2 * candidates[i] ** 2)).logsumexp(1) for part in square.split(32)]
                scores[i] = float(torch.cat(rows).mean()) - points.shape[1] * math.log(
                    candidates[i]
                )  # up to a constant
        return max(scores, key=scores.__getitem__)

    coarse = best_of(range(0, 40, 4))
    return float(candidates[best_of(range(max(0, coarse - 3), min(40, coarse + 4)))])


def load_points(path: Path, bandwidth: float | None = None) -> OwnPoints:
    """Load the user's own points as a distribution; see read_table and OwnPoints for what they raise."""
    points, columns = read_table(path)
    return OwnPoints(points, bandwidth, columns)


# Reading ------------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> tuple[Tensor, tuple[str, ...]]:
    """Read points [N, 2] (float64) and the names of their columns.

    Raises:
        ValueError: another kind of file, other than two columns, text, NaN or infinite values, fewer than 10 points.
        OSError: a file that is missing or cannot be read.
    """
    kind = path.suffix.lower()
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder, where a table of points is meant")
    if kind not in (*TEXT, ".npy"):
        raise UserError(f"{path}: points come as {' '.join(TEXT)} or .npy, not '{kind or 'a file without extension'}'")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    columns: tuple[str, ...] = ()
    try:
        if kind == ".npy":
            points = np.load(path, allow_pickle=False)
            if points.dtype.kind not in "fiu":
                raise UserError(f"its type is {points.dtype}")
            points = points.astype(np.float64)
        else:
            points, columns = parse(path.read_text(encoding="utf-8-sig"))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: not a table of numbers ({first_line(error)})") from None
    check(path, points)
    return torch.from_numpy(points), columns if len(columns) == 2 else ("x", "y")


def parse(text: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read a table [N, M] and its header, empty if there is none, from text; lines that begin with # are left out.

    Raises:
        ValueError: no lines, or text where numbers belong.
    """
    lines = {i: line for i, line in enumerate(text.replace('"', "").splitlines(), 1) if line.strip()}
    lines = {i: line for i, line in lines.items() if not line.lstrip().startswith("#")}
    if not lines:
        raise UserError("the file is empty")
    first, *others = lines.values()
    common = (mark for mark in ";\t," if 2 * sum(mark in line for line in lines.values()) >= len(lines))
    separator = next(common, None)  # None: blanks
    columns = tuple(cell.strip() for cell in first.split(separator))
    # column numbers, as pandas writes them where columns have no names, are a header where numbers have points
    numbered = columns == ("0", "1") and any("." in line for line in others)
    header = numbered or not all(map(_is_number, columns))
    if header:
        del lines[next(iter(lines))]
    if not lines:
        raise UserError("nothing but a header")
    if separator in (";", "\t"):
        lines = {i: line.replace(",", ".") for i, line in lines.items()}
    try:
        return np.loadtxt(list(lines.values()), delimiter=separator, ndmin=2), columns if header else ()
    except ValueError as error:
        raise UserError(_where(lines, separator) or first_line(error)) from None


def check(path: Path, points: np.ndarray) -> None:
    """Raise ValueError, with what to do, for numbers that are no points on a plane."""
    if points.ndim != 2 or points.shape[1] != 2:
        shape = " x ".join(map(str, points.shape))
        raise UserError(f"{path}: points must be N x 2, got {shape}{_advice(points)}")
    if len(points) < 10:
        raise UserError(f"{path}: at least 10 points are needed, got {len(points)}")
    if not np.isfinite(points).all():
        bad = np.flatnonzero(~np.isfinite(points).all(1))
        raise UserError(f"{path}: points that are NaN or infinite: {len(bad)}, first point {bad[0] + 1}")
    if np.abs(points).max() > 1e100:
        raise UserError(f"{path}: numbers beyond 1e100 cannot be standardised")
    for axis in range(2):
        if np.ptp(points[:, axis]) == 0:
            raise UserError(f"{path}: column {axis + 1} is constant")


def _advice(points: np.ndarray) -> str:
    if points.ndim != 2 or points.shape[1] == 1:
        return "; columns are separated by commas, semicolons, tabs or blanks"
    if points.shape[1] == 3 and (np.diff(points[:, 0]) == 1).all():
        return "; the first column counts the rows, leave it out"
    return (
        "; this command draws the plane: choose two columns, or train on all of them with TVM in your own loop, which "
        "takes any shape (README.md, 'In your own training loop')"
    )


def _where(lines: dict[int, str], separator: str | None) -> str:
    """Say what is wrong with the first line, by its number in the file, that has no numbers or too few of them."""
    width = len(next(iter(lines.values())).split(separator))
    for i, line in lines.items():
        cells = [cell.strip() for cell in line.split(separator)]
        for column, cell in enumerate(cells, 1):
            if not _is_number(cell) or "," in cell:
                return f"line {i}, column {column}: " + (f"{cell!r} is no number" if cell else "an empty cell")
        if len(cells) != width:
            return f"line {i} has {len(cells)} column{'s' * (len(cells) > 1)}, and the lines before it {width}"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", "."))
    except ValueError:
        return False
    return True
