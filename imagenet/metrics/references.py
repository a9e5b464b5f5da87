"""Reference statistics for FID and related metrics, read without executing anything.

.npz of ADM, EDM   mu, sigma; of ADM also arr_0, the images, for precision and recall
.pkl of EDM2       {"fid": {"mu", "sigma"}, ...}
folder, .npz       images only: everything is computed from them
"""

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imagenet.data.image_files import DAMAGED, NPZ_IMAGES, ImageFiles, array_header
from imagenet.foreign.restricted_pickle import read_pickle, to_array
from imagenet.metrics.frechet import Gaussian
from imagenet.metrics.inception import Features
from tvm_ref.cli.errors import UserError, require, user_errors, user_files

MAX_SIZE = 4096  # largest length of a mean: Inception's features have 2048 numbers


@dataclass(frozen=True)
class Reference:
    """Real images, or their statistics, that generated images are measured against.

    Attributes:
        name: the file's or folder's.
        pool: statistics for FID.
        images: real images, for precision and recall, if known.
    """

    name: str
    pool: Gaussian | None = None
    images: ImageFiles | None = None


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
        return Reference(path.name, _from_pickle(path))
    raise UserError(f"{path} is no reference: a .npz or .pkl of statistics, or a folder of images")


def check_reference(reference: Reference, features: Features) -> None:
    """Check that features can be measured against a reference: those of the first images, before many are made.

    Raises:
        UserError: statistics of another size than the features'.
    """
    size = features.pool.shape[1]
    found = size if reference.pool is None else len(reference.pool.mean)
    require(found == size, f"{reference.name} holds statistics of {found} numbers, where features have {size}")


def _from_npz(path: Path) -> Reference:
    """Read statistics and images of a .npz file."""
    with user_errors(f"{path} cannot be read", *DAMAGED), zipfile.ZipFile(path) as archive:
        known = {name.removesuffix(".npy") for name in archive.namelist()}
        has_statistics = known.issuperset(("mu", "sigma"))
        pool = to_gaussian(_array(archive, "mu"), _array(archive, "sigma")) if has_statistics else None
    held = has_statistics or NPZ_IMAGES in known
    require(held, f"{path} holds neither mu and sigma nor images ({NPZ_IMAGES})")
    return Reference(path.name, pool, ImageFiles(path) if NPZ_IMAGES in known else None)


def _array(archive: zipfile.ZipFile, name: str) -> Any:
    """Read an array of an archive; its header says how large it is before anything is inflated."""
    with archive.open(f"{name}.npy") as stream:
        shape, _, dtype = array_header(stream)
    small = len(shape) <= 2 and max(shape, default=0) <= MAX_SIZE
    require(small and dtype.kind in "fiu", f"{name} is an array {list(shape)} of {dtype}")
    with archive.open(f"{name}.npy") as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _from_pickle(path: Path) -> Gaussian:
    """Read the statistics of a .pkl file."""
    stored = read_pickle(path)
    statistics = stored.get("fid") if isinstance(stored, dict) else None
    if not isinstance(statistics, dict) or not statistics.keys() >= {"mu", "sigma"}:
        raise UserError(f"{path} holds no statistics (mu and sigma, as 'fid')")
    with user_errors(path, UserError):
        return to_gaussian(to_array(statistics["mu"]), to_array(statistics["sigma"]))


def to_gaussian(mean: Any, covariance: Any) -> Gaussian:
    """Return the two arrays in float64.

    Raises:
        UserError: they are not of finite numbers that fit each other.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean)) and 1 <= len(mean) <= MAX_SIZE
    require(fits, f"a mean {list(mean.shape)} and a covariance {list(covariance.shape)} do not fit")
    finite = np.isfinite(mean).all() and np.isfinite(covariance).all()
    require(finite, "mean or covariance hold numbers that are not finite")
    return Gaussian(mean, covariance)
