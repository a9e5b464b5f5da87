"""Reference statistics for FID and its relatives, read without executing anything.

.npz of ADM        mu, sigma; mu_s, sigma_s for sFID; arr_0, the images, for precision and recall
.npz of EDM        mu, sigma
.pkl of EDM2       {"fid": {"mu", "sigma"}, ...}
.pkl of StyleGAN   raw_mean, raw_cov and num_items, sums over images
folder, .npz       images alone: everything is computed from them
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from imagenet.image_files import NPZ_IMAGES, ImageFiles
from imagenet.inception import Features
from imagenet.metrics import Gaussian, gaussian_statistics
from imagenet.pickled_arrays import read_arrays

Extract = Callable[[ImageFiles], Features]


@dataclass(frozen=True)
class Reference:
    """What images are measured against.

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
        """The same, with the statistics that it lacks computed from the features of its images."""
        pool = self.pool or gaussian_statistics(features.pool)
        return Reference(self.name, pool, self.spatial or gaussian_statistics(features.spatial), self.images)


def read_reference(path: Path) -> Reference:
    """Reference statistics or images.

    Raises:
        ValueError: a file that holds neither, or holds anything that loading would execute.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return Reference(path.name, images=ImageFiles(path))
    if path.suffix == ".npz":
        return _from_npz(path)
    if path.suffix == ".pkl":
        return Reference(path.name, pool=_from_pickle(path))
    raise ValueError(f"{path} is no reference: a .npz or .pkl of statistics, or a folder of images")


def _from_npz(path: Path) -> Reference:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            known = set(stored.files)
            pool, spatial = (
                Gaussian(stored[f"mu{end}"], stored[f"sigma{end}"]) if {f"mu{end}", f"sigma{end}"} <= known else None
                for end in ("", "_s")
            )
    except (ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    if pool is None and NPZ_IMAGES not in known:
        raise ValueError(f"{path} holds neither mu and sigma nor images ({NPZ_IMAGES}), only {sorted(known)}")
    return Reference(
        path.name,
        _checked(path, pool),
        _checked(path, spatial),
        ImageFiles(path) if NPZ_IMAGES in known else None,
    )


def _from_pickle(path: Path) -> Gaussian:
    stored = read_arrays(path)
    if isinstance(stored, dict) and isinstance(stored.get("fid"), dict):
        stored = stored["fid"]
    stored = stored if isinstance(stored, dict) else {}
    if {"mu", "sigma"} <= set(stored):
        return _checked(path, Gaussian(stored["mu"], stored["sigma"]))
    if {"raw_mean", "raw_cov", "num_items"} <= set(stored):
        n = stored["num_items"]
        mean = np.asarray(stored["raw_mean"], np.float64) / n
        return _checked(path, Gaussian(mean, (stored["raw_cov"] - n * np.outer(mean, mean)) / (n - 1)))
    raise ValueError(f"{path} holds no statistics (mu and sigma, or raw_mean, raw_cov and num_items)")


def _checked(path: Path, gaussian: Gaussian | None) -> Any:
    if gaussian is None:
        return None
    mean, covariance = (np.asarray(a, np.float64) for a in gaussian)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{path}: a mean {list(mean.shape)} and a covariance {list(covariance.shape)} do not fit")
    return Gaussian(mean, covariance)
