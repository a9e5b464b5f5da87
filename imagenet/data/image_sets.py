"""Data sets of images and of latents, and `load_data`, which loads that of a configuration.

A data set returns many samples at once: data.batch(indices, draw). `draw` counts the epochs: random choices at each
visit (flips, latents of a posterior) are decided by (seed, draw, index).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagenet.config import Config
from imagenet.data.digits import load_digits
from imagenet.data.fashion import CLASSES, load_fashion
from imagenet.data.latents import Latents
from imagenet.data.noise import FLIP
from imagenet.data.pictures import read_pictures
from imagenet.data.provenance import Provenance
from tvm_ref.cli.errors import UserError, require, user_errors


class Images:
    """Images that fit in memory.

    Args:
        x: [N, C, H, W], uint8 (0 to 255) or float in [-1, 1].
        labels: [N].
        flip: mirror half of them, different ones at each visit.
        seed: seed of the flips.
    """

    def __init__(self, x: Tensor, labels: Tensor, *, flip: bool = False, seed: int = 0):
        self.x, self.labels, self.flip, self.seed = x, labels, flip, seed
        self.shape = (x.shape[1], x.shape[2], x.shape[3])

    def __len__(self) -> int:
        return len(self.x)

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """Return images x [B, C, H, W] and labels [B]; `draw` decides which of them are mirrored."""
        chosen = torch.as_tensor(indices)
        x, labels = self.x[chosen], self.labels[chosen]
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x
        if self.flip:
            flips = np.random.default_rng((FLIP, self.seed, draw)).random(len(self)) < 0.5
            x = torch.where(torch.from_numpy(flips)[chosen].view(-1, 1, 1, 1), x.flip(-1), x)
        return x, labels


class OwnPictures(Images):
    """The training pictures of a user's folder, as a run has stored them in its own folder.

    Raises:
        UserError: no pictures there.
    """

    def __init__(self, run: str | Path, *, flip: bool = False, seed: int = 0):
        stored = read_pictures(Path(run))
        super().__init__(*stored.train, flip=flip, seed=seed)
        self.classes, self.brightness = stored.classes, stored.brightness


class Synthetic:
    """Normal noise with labels, for throughput: as many samples as ImageNet, drawn from a small store."""

    STORE = 256

    def __init__(self, shape: tuple[int, int, int], classes: int):
        self.shape, self.classes = shape, classes
        self._x = torch.randn(self.STORE, *shape, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 1_281_167

    def batch(self, indices: Sequence[int], draw: int) -> tuple[Tensor, Tensor]:
        """Return samples x [B, C, H, W] and labels [B], the same at every draw."""
        chosen = torch.as_tensor(indices)
        return self._x[chosen % self.STORE], chosen % self.classes


Data = Images | Synthetic | Latents


def load_data(config: Config, folder: str | Path | None = None) -> Data:
    """Load the data of a configuration.

    Args:
        config: names the data.
        folder: where latents lie, or fashion or cifar10, fetched into it if missing; the folder of a run that has
            read pictures.

    Raises:
        UserError: no such data there, or of another shape or number of classes than the configuration says; an extra
            of the package that is not installed.
    """
    shape = (config.in_channels, config.input_size, config.input_size)
    if config.data == "synthetic":
        return Synthetic(shape, config.classes)
    if config.data == "digits":
        data: Images | Latents = Images(*load_digits().train)
    elif folder is None:
        raise UserError(f"{config.data} need data_path, the folder that they lie in")
    elif config.data == "fashion":
        data = Images(*load_fashion(folder).train)
    elif config.data == "cifar10":
        data = Images(*_load_cifar10(folder), flip=True, seed=config.seed)
    elif config.data == "folder":
        data = OwnPictures(folder, flip=config.flip, seed=config.seed)
    else:
        data = Latents(folder, config.seed)
    fits = data.shape == shape
    require(fits, f"the data are of shape {list(data.shape)}, the configuration asks for {list(shape)}")
    found = len(data.classes) if isinstance(data, Latents | OwnPictures) else int(data.labels.max()) + 1
    require(found == config.classes, f"the data have {found} classes, the configuration {config.classes}")
    return data


def fit_to_data(config: Config, folder: str | Path) -> Config:
    """Return a configuration with the shape and the number of classes of the latents or pictures in a folder.

    Raises:
        UserError: none there, or patches that do not tile them.
    """
    data = OwnPictures(folder) if config.data == "folder" else Latents(folder)
    channels, side, _ = data.shape
    return replace(config, in_channels=channels, input_size=side, classes=len(data.classes))


def provenance_of(config: Config, data: Data, folder: str | Path | None = None) -> Provenance:
    """Describe the data that a configuration is trained on, and their folder."""
    known = Provenance(config.data, None if folder is None else str(Path(folder).absolute()))
    if isinstance(data, OwnPictures):
        return replace(known, classes=data.classes, brightness=data.brightness)
    if config.data == "fashion":
        return replace(known, classes=CLASSES)
    if not isinstance(data, Latents):
        return known
    return replace(known, autoencoder=data.autoencoder, normalisation=data.normalisation, classes=tuple(data.classes))


def _load_cifar10(folder: str | Path) -> tuple[Tensor, Tensor]:
    """Load the training split, and fetch it first if it is not there: images uint8 [50000, 3, 32, 32] and labels."""
    with user_errors("cifar10 needs torchvision (pip install -e '.[imagenet]')", ImportError):
        from torchvision.datasets import CIFAR10
    # a RuntimeError is torchvision's way to say that files are damaged
    with user_errors(f"no CIFAR-10 in {folder}, and it could not be fetched", RuntimeError, OSError):
        stored = CIFAR10(str(folder), train=True, download=True)  # downloads only missing files
    return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)
