"""Where random numbers come from: one generator per purpose, decided by integers alone."""

import numpy as np
import torch

EVALUATION, BOUND, SAMPLING = 2**40, 2**41, 2**42  # seeds of measuring and sampling, apart from those of training


def generator(*key: int) -> torch.Generator:
    """Make a generator that its key (integers from 0 on) decides; different keys give independent numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)
