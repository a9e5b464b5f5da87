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
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from imagenet.data.noise import POSTERIOR, normal
from imagenet.data.vae import Normalisation
from tvm_ref.cli.errors import UserError, first_line
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
    """A folder of latents as a map-style data set: latents[index] is (x, label).

    x float32 [C, H, W] is a draw from the image's posterior, normalised, and label its class. The draw is decided by
    (seed, draw, index), so that a resumed training sees what an uninterrupted one would: latents[index, draw] with
    draw the epoch or step, from a sampler that yields such pairs; latents[index] is draw 0.

    Args:
        folder: what encode.py wrote.
        seed: of the draws.

    Raises:
        ValueError: no latents there, or damaged ones; the file is named.
    """

    def __init__(self, folder: str | Path, seed: int = 0):
        self.folder, self.seed = Path(folder), seed
        index = read_index(self.folder)
        self.classes, self.normalisation = index.classes, index.normalisation
        self.autoencoder = index.autoencoder
        opened = [self._open(name, count) for name, count in index.shards.items() if count]
        if not opened:
            raise UserError(f"{self.folder} holds no latents: every image was skipped")
        self._posteriors = [posteriors for posteriors, _ in opened]
        self.labels = torch.from_numpy(np.concatenate([labels for _, labels in opened]))
        if len({posteriors.shape[1:] for posteriors in self._posteriors}) > 1:
            raise UserError(f"{self.folder}: its shards hold latents of different shapes")
        if not bool(((self.labels >= 0) & (self.labels < len(self.classes))).all()):
            raise UserError(f"{self.folder} holds labels beyond its {len(self.classes)} classes")
        self._ends = list(itertools.accumulate(len(posteriors) for posteriors in self._posteriors))
        _, _, c, h, w = self._posteriors[0].shape
        self.shape: tuple[int, int, int] = (c, h, w)  # of a latent

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Draw the latent x [C, H, W], and return it with its label, for an index or a pair (index, draw)."""
        index, draw = key if isinstance(key, tuple) else (key, 0)
        mean, std = self.posterior(index)
        raw = mean + std * normal(self.shape, POSTERIOR, self.seed, draw, index)
        return self.normalisation.normalise(raw), int(self.labels[index])

    def batch(self, indices: Sequence[int] | NDArray[np.int64], draw: int) -> tuple[Tensor, Tensor]:
        """Draw latents x [B, C, H, W], and return them with labels [B], for many indices."""
        pairs = [self[int(index), draw] for index in indices]
        return torch.stack([x for x, _ in pairs]), torch.tensor([label for _, label in pairs])

    def posterior(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of an image's raw latent, float32 [C, H, W] each.

        Raises:
            IndexError: an index outside [0, len).
            UserError: numbers that are not finite; the file is named.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} lies outside [0, {len(self)})")
        shard = bisect.bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        stored = self._posteriors[shard][index - start].astype(np.float32)
        if not np.isfinite(stored).all():  # else training would end in NaN at this step, however often it is resumed
            file = getattr(self._posteriors[shard], "filename", self.folder)
            raise UserError(f"{file}: latent {index - start} holds numbers that are not finite; encode it again")
        mean, std = torch.from_numpy(stored)
        return mean, std

    def _open(self, name: str, count: int) -> tuple[NDArray[np.float16], NDArray[np.int64]]:
        """Open the memory map [count, 2, C, H, W] and the labels [count] of a shard."""
        latents, labels = (self.folder / file for file in shard_files(name))
        try:
            posteriors = np.load(latents, mmap_mode="r", allow_pickle=False)
            classes = np.load(labels, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{self.folder}: shard {name} cannot be read: {str(error).splitlines()[0]}") from None
        fits = posteriors.ndim == 5 and posteriors.shape[:2] == (count, 2) and posteriors.dtype == np.float16
        if not fits or classes.shape != (count,) or classes.dtype != np.int64:
            raise UserError(f"{latents} and its labels do not hold {count} posteriors as {INDEX} says")
        return posteriors, classes


def shard_files(name: str) -> tuple[str, str]:
    """Return the names of the files of posteriors and of labels of a shard."""
    return f"{name}.latents.npy", f"{name}.labels.npy"


class Index(NamedTuple):
    """The content of latents.json.

    Attributes:
        image_size: side of the images in pixels.
        classes: their names, by number.
        normalisation: of the latents.
        shards: number of latents by name.
        autoencoder: that made them: a folder, or a name on the Hugging Face hub.
    """

    image_size: int
    classes: list[str]
    normalisation: Normalisation
    shards: dict[str, int]
    autoencoder: str | None


def read_index(folder: Path) -> Index:
    """Read the latents.json of a folder.

    Raises:
        UserError: none there, a damaged one, or one of another format.
    """
    path = folder / INDEX
    if not path.is_file():
        raise UserError(f"{folder} holds no latents (no {INDEX}); imagenet/encode.py makes them")
    stored = read_json(path, "folder of latents", ("format", "image_size", "classes", "normalisation", "shards"))
    if stored["format"] != FORMAT:
        raise UserError(f"{path} is not in the format {FORMAT!r}")
    try:
        norm = stored["normalisation"]
        return Index(
            stored["image_size"],
            stored["classes"],
            Normalisation(tuple(norm["mean"]), tuple(norm["std"])),
            {Path(shard["name"]).name: int(shard["count"]) for shard in stored["shards"]},  # in this folder
            stored.get("vae"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {first_line(error):.200}") from None


def write_shard(folder: Path, name: str, posteriors: NDArray[np.float16], labels: NDArray[np.int64]) -> None:
    """Write posteriors [n, 2, C, H, W] and labels [n], each file complete or not at all."""
    arrays: tuple[NDArray[Any], ...] = (posteriors, labels)
    for file, array in zip(shard_files(name), arrays, strict=True):
        partial = folder / f"{file}.{os.getpid()}.partial"
        with partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
        os.replace(partial, folder / file)
