"""Fashion-MNIST (Xiao et al. 2017): 60,000 grey pictures of clothes, 28 x 28, ten classes, and 10,000 held out."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from imagenet.data.digits import Split
from tvm_ref.cli.errors import user_errors

CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip


def load_fashion(folder: str | Path) -> Split:
    """Load the four files of Fashion-MNIST, and fetch them first if they are not there.

    Args:
        folder: holds train-images-idx3-ubyte.gz and its three companions (Debian's package dataset-fashion-mnist puts
            them in /usr/share/datasets/fashion-mnist), or gets FashionMNIST/raw, as torchvision makes it.

    Returns:
        Images, uint8 [N, 1, 28, 28], and labels [N].

    Raises:
        UserError: the files are damaged, or missing and could not be fetched; torchvision is not installed.
    """
    folder = Path(folder)
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        with user_errors("fetching Fashion-MNIST needs torchvision (pip install -e '.[imagenet]')", ImportError):
            from torchvision.datasets import FashionMNIST
        # a RuntimeError is torchvision's way to say that files are damaged
        with user_errors(f"no Fashion-MNIST in {folder}, and it could not be fetched", RuntimeError, OSError):
            folder = Path(FashionMNIST(str(folder), download=True).raw_folder)
    with user_errors(f"the files in {folder} are not those of Fashion-MNIST", ValueError, EOFError, OSError):
        return Split(_read(folder, "train"), _read(folder, "t10k"))


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Read images and labels of a part; both files begin with a short header, of 16 and 8 bytes."""
    images, labels = (
        np.frombuffer(gzip.decompress((folder / f"{part}-{kind}-ubyte.gz").read_bytes()), np.uint8, offset=header)
        for kind, header in (("images-idx3", 16), ("labels-idx1", 8))
    )
    x = images.reshape(len(labels), 1, 28, 28)  # a ValueError if they do not belong together
    return torch.tensor(x), torch.tensor(labels, dtype=torch.int64)
