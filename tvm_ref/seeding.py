"""Sources of random numbers: generators and quasi-random points, seeded by integers."""

import numpy as np
import torch
from torch import Tensor

EVALUATION, BOUND, SAMPLING = 2**40, 2**41, 2**42  # seeds for measuring and sampling, distinct from those of training


def generator(*key: int) -> torch.Generator:
    """Make a generator seeded by its key (integers of at least 0); different keys give independent numbers."""
    seed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) % 2**63)


def uniform_numbers(n: int, columns: int, *key: int) -> Tensor:
    """Draw n quasi-random points of the unit cube, u [n, columns] (float64), seeded by the key as in `generator`.

    Each point is uniform, as with torch.rand, but together they are spread evenly: every batch of 2^k points of a
    scrambled Sobol sequence fills the cube without clumps and gaps. So gradients keep their mean and lose most
    of their noise (Buchholz, Wenzel and Mandt, "Quasi-Monte Carlo variational inference", 1807.01604).
    """
    engine = torch.quasirandom.SobolEngine(columns, scramble=True, seed=generator(*key).initial_seed())
    return engine.draw(n, dtype=torch.float64) + 2.0**-31  # from multiples of 2^-30 to the middles of their cells
