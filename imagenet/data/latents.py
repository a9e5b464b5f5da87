"""Latents of images on disk.

A folder of latents, as encode.py writes it:

    latents.json            image size, classes, normalisation, shards: what `Latents` reads
    00000.latents.npy       float16 [n, 2, C, H, W]: mean and standard deviation of each image's posterior
    00000.labels.npy        int64 [n]

The shards are memory-mapped. Each time that training visits an image, it draws a new latent from the posterior.
"""

import bisect
import itertools
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.data.noise import POSTERIOR, normal
from imagenet.data.vae import Normalisation
from tvm_ref.cli.errors import require, user_errors
from tvm_ref.cli.files import read_json

INDEX = "latents.json"
FORMAT = "tvm-ref latents, version 1"


def moments(posteriors: NDArray[np.float16]) -> list[list[float]]:
    """Compute first and second moment of the raw latents drawn from posteriors [n, 2, C, H, W], per channel."""
    mean, std = posteriors.astype(np.float64).swapaxes(0, 1)
    return [mean.mean((0, 2, 3)).tolist(), (mean**2 + std**2).mean((0, 2, 3)).tolist()]


def measured_normalisation(reports: Iterable[dict[str, Any]]) -> Normalisation:
    """Compute mean and standard deviation of all raw latents, per channel, from the moments of the shards."""
    known = [report for report in reports if report["count"]]
    first, second = np.average(
        [report["moments"] for report in known], axis=0, weights=[report["count"] for report in known]
    )
    return Normalisation(tuple(first.tolist()), tuple(np.sqrt(second - first**2).tolist()))


class Latents:
    """The latents of a folder: each is a draw from the image's posterior, normalised, decided by (seed, draw, index).

    A resumed training therefore sees the same latents as an uninterrupted one.

    Args:
        folder: output of encode.py.
        seed: seed of the draws.

    Raises:
        ValueError: no latents there, or shards that cannot be read.
    """

    def __init__(self, folder: str | Path, seed: int = 0):
        self.folder, self.seed = Path(folder), seed
        index = _read_index(self.folder / INDEX)
        self.autoencoder: str | None = index.get("vae")  # a folder, or a name on the Hugging Face hub
        with user_errors(f"{self.folder / INDEX} is damaged", KeyError, TypeError, ValueError):
            self.classes: list[str] = index["classes"]  # their names, by number
            mean, std = (tuple(index["normalisation"][key]) for key in ("mean", "std"))
            self.normalisation = Normalisation(mean, std)
            self._names = [Path(shard["name"]).name for shard in index["shards"] if shard["count"]]  # in this folder
        opened = [self._open(name) for name in self._names]
        self._posteriors = [posteriors for posteriors, _ in opened]
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in opened]))
        self._ends = list(itertools.accumulate(len(posteriors) for posteriors in self._posteriors))
        _, _, c, h, w = self._posteriors[0].shape
        self.shape: tuple[int, int, int] = (c, h, w)  # of a latent

    def __len__(self) -> int:
        return self._ends[-1]

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """Draw latents x [B, C, H, W], and return them with labels [B]; `draw` is the epoch."""
        raw = []
        for index in indices:
            mean, std = self.posterior(index)
            raw.append(mean + std * normal(self.shape, POSTERIOR, self.seed, draw, index))
        return self.normalisation.normalise(torch.stack(raw)), self.labels[torch.as_tensor(indices)]

    def posterior(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of an image's raw latent, float32 [C, H, W] each."""
        shard = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[shard - 1] if shard else 0)
        stored = self._posteriors[shard][row].astype(np.float32)
        if not np.isfinite(stored).all():
            file = self.folder / shard_files(self._names[shard])[0]
            warnings.warn(f"{file}, row {row}: numbers that are not finite", stacklevel=2)
        mean, std = torch.from_numpy(stored)
        return mean, std

    def _open(self, name: str) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Open the memory map [n, 2, C, H, W] and the labels [n] of a shard."""
        latents, labels = (self.folder / file for file in shard_files(name))
        with user_errors(f"{self.folder}: shard {name} cannot be read", OSError, ValueError, EOFError):
            return np.load(latents, mmap_mode="r", allow_pickle=False), np.load(labels, allow_pickle=False)


def shard_files(name: str) -> tuple[str, str]:
    """Return the names of the files of posteriors and of labels of a shard."""
    return f"{name}.latents.npy", f"{name}.labels.npy"


def _read_index(path: Path) -> dict[str, Any]:
    """Read the latents.json of a folder."""
    require(path.is_file(), f"{path.parent} holds no latents (no {INDEX}); imagenet/encode.py makes them")
    stored = read_json(path, "folder of latents", ("format", "classes", "normalisation", "shards"))
    require(stored["format"] == FORMAT, f"{path} is not in the format {FORMAT!r}")
    return stored


def write_shard(folder: Path, name: str, posteriors: NDArray[np.float16], labels: NDArray[np.int64]) -> None:
    """Write posteriors [n, 2, C, H, W] and labels [n], each file complete or not at all."""
    arrays: tuple[NDArray[Any], ...] = (posteriors, labels)
    for file, array in zip(shard_files(name), arrays, strict=True):
        partial = folder / f"{file}.partial"
        with partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        os.replace(partial, folder / file)
