"""Reading Fashion-MNIST."""

import gzip

import numpy as np
import pytest
import torch

from imagenet.data.fashion import load_fashion
from tests.imagenet.fashion import write_fashion
from tvm_ref.cli.errors import UserError


def test_what_is_read_is_what_was_written(tmp_path):
    written = write_fashion(tmp_path, 30, 20)
    for (x, labels), (pictures, numbers) in zip(load_fashion(tmp_path), written, strict=True):
        np.testing.assert_array_equal(x.numpy(), pictures)
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(labels.numpy(), numbers)


@pytest.mark.parametrize(
    "damage", [b"", b"no gzip", gzip.compress(bytes(100), mtime=0)], ids=["empty", "text", "short"]
)
def test_damaged_files_are_named(tmp_path, damage):
    write_fashion(tmp_path, 30, 20)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(damage)
    with pytest.raises(UserError, match="not those of Fashion-MNIST"):
        load_fashion(tmp_path)


def test_missing_files_that_cannot_be_fetched(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    with pytest.raises(UserError, match="no Fashion-MNIST in"):
        load_fashion(tmp_path)
