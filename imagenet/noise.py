"""Normal noise as a pure function of integers: the same for any number of ranks, any batch size, and when resumed."""

import numpy as np
import torch
from torch import Tensor

POSTERIOR, PRIOR = 1, 2  # what noise is for, the first integer of its key: no stream is used twice


def normal(shape: tuple[int, ...], *key: int) -> Tensor:
    """N(0, I) in float32, decided by the key (integers from 0 on). Different keys give independent noise."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))
