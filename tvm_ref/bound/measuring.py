"""Settings for measuring the bound, for the commands here and in experiments: how many points, at which times."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tvm_ref.bound.paths import STEPS, Draws, time_grid
from tvm_ref.cli.errors import require
from tvm_ref.cli.options import check_types, option
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.seeding import BOUND
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.mixture import GaussianMixture

MAX_POINTS = 5000  # exact optimal transport holds points^2 costs
WHILE_TRAINING = {"points": 500, "grid": STEPS // 2}  # defaults where many networks are measured


@dataclass(frozen=True)
class Measuring:
    """Points and times that the bound is measured on.

    Raises:
        UserError: a bad value, named by its option.
    """

    time: float = option(1.0, "time t in (0, 1] at which the jump to 0 starts")
    points: int = option(2000, "number of points to measure on (default: 2000 for a finished run, 500 in experiments)")
    grid: int = option(
        STEPS, f"time steps of the integrals, even (default: {STEPS} for a finished run, {STEPS // 2} in experiments)"
    )

    def __post_init__(self) -> None:
        check_types(self)
        require(0 < self.time <= 1, f"--time must lie in (0, 1], got {self.time}")
        require(10 <= self.points <= MAX_POINTS, f"--points must lie in [10, {MAX_POINTS}], got {self.points}")
        require(self.grid >= 4 and self.grid % 2 == 0, f"--grid must be even and at least 4, got {self.grid}")

    def draw(self, distribution: GaussianMixture) -> Draws:
        """Draw data and noise [points, D]."""
        generator = torch.Generator().manual_seed(BOUND)
        x0 = distribution.sample(self.points, generator)[0]
        return Draws(x0, torch.randn(x0.shape, generator=generator, dtype=x0.dtype))

    def times(self, distribution: GaussianMixture) -> Tensor:
        """Space times from 0 to t [grid + 1] for the exact flow of a distribution."""
        return time_grid(self.time, distribution.time_scale, self.grid)


def require_covered(config: ToyConfig) -> None:
    """Raise UserError for training that theorem 1 does not cover."""
    require(not config.conditional, "the bound is measured without classes and guidance; this run has --conditional")
    learns_jumps = OBJECTIVES[config.objective].learns_jumps
    require(learns_jumps, "flow matching learns no jumps to bound; choose --objective tvm, pid or meanflow")
