"""The digits that ship with scikit-learn: 1437 images to learn from, 360 held out."""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tvm_ref.cli.errors import user_errors

TEST = 360  # images held out


class Split(NamedTuple):
    """Images float32 [N, 1, 8, 8] in [-1, 1] and labels [N], to learn from and held out."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.cache
def load_digits() -> Split:
    """Load the digits, in a fixed split that keeps the proportions of the classes.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    with user_errors("the digits come with scikit-learn (pip install -e '.[imagenet]')", ImportError):
        from sklearn import datasets
        from sklearn.model_selection import train_test_split
    stored = datasets.load_digits()
    x = (stored.images[:, None] / 8 - 1).astype(np.float32)
    parts = train_test_split(x, stored.target.astype(np.int64), test_size=TEST, stratify=stored.target, random_state=0)
    x_train, x_test, y_train, y_test = map(torch.from_numpy, parts)
    return Split((x_train, y_train), (x_test, y_test))
