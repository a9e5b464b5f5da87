"""Sources of random numbers: one generator per purpose, seeded by integers."""

import numpy as np
import torch
from torch import Tensor

EVALUATION, BOUND, SAMPLING = 2**40, 2**41, 2**42  # seeds of measuring and sampling, apart from those of training


def generator(*key: int) -> torch.Generator:
    """Make a generator that its key (integers from 0 on) decides; different keys give independent numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


def uniform_numbers(n: int, columns: int, *key: int) -> Tensor:
    """Draw n quasi-random points of the unit cube, u [n, columns] (float64), which the key decides as in `generator`.

    Each is uniform, as torch.rand's are, but together they are spread evenly: a scrambled Sobol sequence, of which
    batch after batch of 2^k points fills the cube without clumps and gaps. So gradients keep their mean and lose most
    of their noise (Buchholz, Wenzel and Mandt, "Quasi-Monte Carlo variational inference", 1807.01604).
    """
    engine = torch.quasirandom.SobolEngine(columns, scramble=True, seed=generator(*key).initial_seed())
    return engine.draw(n, dtype=torch.float64) + 2.0**-31  # multiples of 2^-30 from 0 on, to the middles of their cells
