"""A stand-in for Fashion-MNIST, in its format: class k is a band of brightness at height 2 k + 4, in noise."""

import gzip

import numpy as np


def write_fashion(folder, train, test):
    """Write the four files; returns images uint8 [N, 1, 28, 28] and labels of both parts."""
    rng, parts = np.random.default_rng(0), []
    for part, count in (("train", train), ("t10k", test)):
        labels = rng.integers(10, size=count).astype(np.uint8)
        x = rng.integers(60, size=(count, 1, 28, 28))
        rows = np.abs(np.arange(28)[:, None] - (2 * labels[:, None, None, None] + 4)) < 2
        x = (x + 150 * rows).astype(np.uint8)
        for kind, header, values in (("images-idx3", 16, x), ("labels-idx1", 8, labels)):
            stored = bytes(header) + values.tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(stored, 1))
        parts.append((x, labels))
    return parts
