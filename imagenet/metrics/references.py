"""Reference statistics for FID and its relatives, read without executing anything.

.npz of ADM        mu, sigma; mu_s, sigma_s for sFID; arr_0, the images, for precision and recall
.npz of EDM        mu, sigma
.pkl of EDM2       {"fid": {"mu", "sigma"}, ...}
.pkl of StyleGAN   raw_mean, raw_cov and num_items, sums over images
folder, .npz       images only: everything is computed from them
"""

import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imagenet.data.image_files import DAMAGED, NPZ_IMAGES, ImageFiles
from imagenet.foreign.restricted_pickle import Object, read_pickle, to_array
from imagenet.metrics.frechet import Gaussian, covariance_root, gaussian_statistics
from imagenet.metrics.inception import Features
from tvm_ref.cli.errors import UserError, first_line, user_files

MAX_SIZE = 4096  # of a mean: Inception's features have 2048 and 2023 numbers


@dataclass(frozen=True)
class Reference:
    """Real images, or their statistics, that generated images are measured against.

    Attributes:
        name: the file's or folder's.
        pool: statistics for FID.
        spatial: statistics for sFID, if known.
        images: real images, for precision and recall, if known.
    """

    name: str
    pool: Gaussian | None = None
    spatial: Gaussian | None = None
    images: ImageFiles | None = None

    def completed(self, features: Features) -> "Reference":
        """Return the same, with the statistics that it lacks computed from the features of its images."""
        pool = self.pool or gaussian_statistics(features.pool)
        return replace(self, pool=pool, spatial=self.spatial or gaussian_statistics(features.spatial))


@user_files()
def read_reference(path: Path) -> Reference:
    """Read reference statistics or images.

    Raises:
        UserError: a file that holds neither, cannot be read, or holds anything that loading would execute.
    """
    if path.is_dir():
        return Reference(path.name, images=ImageFiles(path))
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".pkl":
        return Reference(path.name, pool=_from_pickle(path))
    raise UserError(f"{path} is no reference: a .npz or .pkl of statistics, or a folder of images")


def check_reference(reference: Reference, features: Features) -> None:
    """Check that features can be measured against a reference: those of the first images, before many are made.

    Args:
        reference: what to measure against.
        features: of some images, for their sizes.

    Raises:
        UserError: statistics of another size than the features', or a matrix that is no covariance.
    """
    for kind in ("pool", "spatial"):
        gaussian: Gaussian | None = getattr(reference, kind)
        size = getattr(features, kind).shape[1]
        if gaussian is None:
            continue
        if len(gaussian.mean) != size:
            raise UserError(
                f"{reference.name} holds statistics of {len(gaussian.mean)} numbers, where {kind} features have {size}"
            )
        try:
            covariance_root(gaussian.covariance)
        except ValueError as error:
            raise UserError(f"{reference.name}: {error}") from None


def _from_npz(path: Path) -> Reference:
    """Read statistics and images of a .npz file."""
    try:
        with zipfile.ZipFile(path) as archive:
            known = {name.removesuffix(".npy") for name in archive.namelist()}
            pool, spatial = (
                to_gaussian(*(_array(archive, name) for name in names)) if known.issuperset(names) else None
                for names in (("mu", "sigma"), ("mu_s", "sigma_s"))
            )
    except DAMAGED as error:
        raise UserError(f"{path} cannot be read: {first_line(error):.80}") from None
    if pool is None and NPZ_IMAGES not in known:
        held = ", ".join(f"{name!r:.80}" for name in sorted(known)[:5])
        raise UserError(f"{path} holds neither mu and sigma nor images ({NPZ_IMAGES}), only {held or 'nothing'}")
    return Reference(path.name, pool, spatial, ImageFiles(path) if NPZ_IMAGES in known else None)


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """Read an array of an archive; its header says how large it is before anything is inflated."""
    with archive.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    if dtype.kind not in "fiu" or len(shape) > 2 or max(shape, default=0) > MAX_SIZE:
        raise UserError(f"{name} is an array {list(shape)} of {dtype}")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _from_pickle(path: Path) -> Gaussian:
    """Read the statistics of a .pkl file."""
    stored = read_pickle(path)
    if isinstance(stored, dict) and isinstance(stored.get("fid"), dict):
        stored = stored["fid"]
    stored = stored if isinstance(stored, dict) else {}
    try:
        for names, gaussian in ((("mu", "sigma"), to_gaussian), (("raw_mean", "raw_cov", "num_items"), from_sums)):
            if stored.keys() >= set(names):
                return gaussian(*(to_array(a) if isinstance(a, Object) else a for a in map(stored.get, names)))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    raise UserError(f"{path} holds no statistics (mu and sigma, or raw_mean, raw_cov and num_items)")


def from_sums(total: Any, squares: Any, n: Any) -> Gaussian:
    """Compute mean and covariance of n features from their sum [D] and the sum of their outer products [D, D]."""
    if not isinstance(n, int | float | np.ndarray) or np.ndim(n) or isinstance(n, bool) or not 2 <= n < 2**53:
        raise UserError("num_items must be a number of at least 2")
    n, (mean, squares) = float(n), to_gaussian(total, squares)
    with np.errstate(all="ignore"):  # what is not finite is refused
        mean = mean / n
        return to_gaussian(mean, (squares - n * np.outer(mean, mean)) / (n - 1))


def to_gaussian(mean: Any, covariance: Any) -> Gaussian:
    """Return the two in float64.

    Raises:
        UserError: they are no arrays of finite numbers that fit each other.
    """
    if not all(isinstance(a, np.ndarray) and a.dtype.kind in "fiu" for a in (mean, covariance)):
        raise UserError("mean and covariance must be arrays of numbers")
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not 1 <= len(mean) <= MAX_SIZE:
        raise UserError(f"a mean {list(mean.shape)} and a covariance {list(covariance.shape)} do not fit")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError("mean or covariance hold numbers that are not finite")
    return Gaussian(mean, covariance)
