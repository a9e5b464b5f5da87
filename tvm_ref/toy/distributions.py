"""The toy distributions, each a finite Gaussian mixture standardised to zero mean and unit variance per axis."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tvm_ref.toy.mixture import GaussianMixture

Drawn = tuple[Tensor, Tensor | None]  # centres [K, 2] and, if there are classes, labels [K]


def standardise(centres: Tensor, sigma: float) -> Tensor:
    """Shift and scale centres [K, D], per axis, so that the mixture with bandwidth sigma has mean 0 and variance 1."""
    centred = centres.double() - centres.double().mean(0)
    return centred * math.sqrt(1 - sigma**2) / centred.square().mean(0).sqrt()


def _polar(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def _middles(n: int) -> Tensor:
    """Return the n midpoints of equal cells of [0, 1]."""
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


def moons() -> Drawn:
    """Place two interleaved half circles; two classes."""
    angle = math.pi * _middles(64)
    upper = _polar(torch.ones(64), angle)
    lower = torch.tensor([1.0, 0.5]) - upper
    return torch.cat([upper, lower]), torch.arange(2).repeat_interleave(64)


def circles() -> Drawn:
    """Place two concentric circles; two classes."""
    angle = 2 * math.pi * _middles(96)
    ring = _polar(torch.ones(96), angle)
    return torch.cat([ring, 0.5 * ring]), torch.arange(2).repeat_interleave(96)


def eight_gaussians() -> Drawn:
    """Place eight blobs on a circle; eight classes."""
    return _polar(torch.ones(8), 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8), torch.arange(8)


def checkerboard() -> Drawn:
    """Fill the eight dark squares of a 4 x 4 board."""
    cell = torch.cartesian_prod(_middles(8), _middles(8))  # [64, 2]
    corner = torch.tensor([(i, j) for i in range(4) for j in range(4) if (i + j) % 2 == 0])  # [8, 2]
    return (corner[:, None] + cell).flatten(0, 1), None


def two_spirals() -> Drawn:
    """Wind two interleaved spirals of one and a half turns."""
    turn = 3 * math.pi * _middles(192).sqrt()
    arm = _polar(turn, turn)
    return torch.cat([arm, -arm]), None


def pinwheel() -> Drawn:
    """Bend five arms around the origin."""
    normal = math.sqrt(2) * torch.erfinv(2 * _middles(16) - 1)
    across = math.sqrt(2) * torch.erfinv(2 * _middles(3) - 1)
    along, lateral = torch.cartesian_prod(1 + 0.3 * normal, 0.05 * across).unbind(-1)  # [48] each
    arms = [
        _polar((along**2 + lateral**2).sqrt(), torch.atan2(lateral, along) + 0.25 * along.exp() + 2 * math.pi * k / 5)
        for k in range(5)
    ]
    return torch.cat(arms), None


def swiss_roll() -> Drawn:
    """Wind one spiral of one and a half turns, seen from above."""
    angle = 1.5 * math.pi * (1 + 2 * _middles(192))
    return _polar(angle, angle), None


DISTRIBUTIONS: dict[str, tuple[Callable[[], Drawn], float]] = {  # name: (centres and labels, bandwidth sigma)
    "moons": (moons, 0.1),
    "circles": (circles, 0.1),
    "eight_gaussians": (eight_gaussians, 0.1),
    "checkerboard": (checkerboard, 0.07),
    "two_spirals": (two_spirals, 0.07),
    "pinwheel": (pinwheel, 0.07),
    "swiss_roll": (swiss_roll, 0.07),
}


def make_distribution(name: str) -> GaussianMixture:
    """Make the named distribution of DISTRIBUTIONS, standardised.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DISTRIBUTIONS:
        raise ValueError(f"unknown distribution '{name}'; choose one of {', '.join(DISTRIBUTIONS)}")
    draw, sigma = DISTRIBUTIONS[name]
    centres, labels = draw()
    return GaussianMixture(standardise(centres, sigma), sigma, labels=labels)


MAX_CENTRES = 4096  # of the user's own points; the exact flow costs points x centres
MIN_BANDWIDTH = 0.03  # below it the exact flow is too stiff for the solver's grid


def read_points(path: Path) -> Tensor:
    """Read points [N, 2] (float64) from a .npy file, or a .csv file of two columns with or without a header line.

    Raises:
        ValueError: another kind of file, other than two columns, text, NaN or infinite values, fewer than 10 points.
        OSError: a file that is missing or cannot be read.
    """
    kind = path.suffix.lower()
    if kind not in (".csv", ".npy"):
        raise ValueError(f"{path}: points come as .csv or .npy, not '{path.suffix or 'a file without extension'}'")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if kind == ".npy":
            points = np.load(path, allow_pickle=False)
            if points.dtype.kind not in "fiu":
                raise ValueError(f"its type is {points.dtype}")
            points = points.astype(np.float64)
        else:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
            if lines and not _is_number(lines[0].split(",")[0]):
                lines = lines[1:]  # a header
            if not lines:
                raise ValueError("the file is empty")
            points = np.loadtxt(lines, delimiter=",", ndmin=2)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: not a table of numbers ({error})") from None
    if points.ndim != 2 or points.shape[1] != 2:
        raise ValueError(f"{path}: points must be N x 2, got {' x '.join(map(str, points.shape))}")
    if len(points) < 10:
        raise ValueError(f"{path}: at least 10 points are needed, got {len(points)}")
    if not np.isfinite(points).all():
        raise ValueError(f"{path}: points that are NaN or infinite: {int((~np.isfinite(points)).any(1).sum())}")
    if np.abs(points).max() > 1e100:
        raise ValueError(f"{path}: numbers beyond 1e100 cannot be standardised")
    for axis in range(2):
        if np.ptp(points[:, axis]) == 0:
            raise ValueError(f"{path}: column {axis + 1} is constant")
    return torch.from_numpy(points)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def likely_bandwidth(points: Tensor) -> float:
    """Choose the bandwidth, of 40 from 0.03 to 0.5, under which each point of [N, D] is likeliest given the others.

    (Leave-one-out likelihood of a kernel density estimate.)
    """
    _n, dim = points.shape
    square = torch.cdist(points, points).square().fill_diagonal_(math.inf)
    candidates = np.geomspace(MIN_BANDWIDTH, 0.5, 40)
    scores = [
        float(torch.logsumexp(-square / (2 * h**2), dim=1).mean()) - dim * math.log(h)  # up to a constant
        for h in candidates
    ]
    return float(candidates[int(np.argmax(scores))])


def load_points(path: Path, bandwidth: float | None = None) -> GaussianMixture:
    """Load the user's own points, standardised: each a centre with the given bandwidth, or the likeliest one.

    Of more than 4,096 points a fixed random subset is kept, as the exact flow costs points x centres.

    Raises:
        ValueError, OSError: see read_points; a bandwidth outside [0.03, 1).
    """
    points = read_points(path)
    if len(points) > MAX_CENTRES:
        keep = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:MAX_CENTRES]
        print(f"{path}: a random {MAX_CENTRES:,} of {len(points):,} points are used")
        points = points[keep]
    if bandwidth is None:
        bandwidth = likely_bandwidth(standardise(points, 0.0))
    if not MIN_BANDWIDTH <= bandwidth < 1:
        raise ValueError(f"the bandwidth must lie in [{MIN_BANDWIDTH}, 1) (data have variance 1), got {bandwidth}")
    return GaussianMixture(standardise(points, bandwidth), bandwidth)
