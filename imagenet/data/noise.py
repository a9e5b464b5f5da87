"""Normal noise as a pure function of integers: the same for any number of ranks, any batch size, and when resumed."""

import numpy as np
import torch
from torch import Tensor

# the first integer of every key of random numbers in imagenet/: no stream is used for two purposes
POSTERIOR, PRIOR = 1, 2  # latents drawn from their posteriors; the noise that samples start from
PERMUTATION, FLIP, STEP = 101, 102, 103  # order of an epoch; mirrored images; noise, times and labels of a step
EVEN = 104  # quasi-random noise and times of a span of steps


def normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """Draw N(0, I) in float32, decided by the key (integers from 0 on). Different keys give independent noise.

    These are numpy's numbers. New code would use the PyTorch generator of tvm_ref.seeding, but published scores, and
    grids that a run draws again, depend on this noise.
    """
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))
