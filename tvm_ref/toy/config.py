"""The toy's settings: one frozen dataclass, each field with a description, which is also its --help."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tvm_ref.cli.errors import UserError, require
from tvm_ref.cli.options import check_types, flag, option, read_settings, require_at_least
from tvm_ref.flow_map import FlowMap
from tvm_ref.objectives import OBJECTIVES, Objective
from tvm_ref.time_samplers import TIME_SAMPLERS, TimeSampler
from tvm_ref.toy.data.distributions import DISTRIBUTIONS, make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture
from tvm_ref.toy.data.points import load_points


@dataclass(frozen=True)
class ToyConfig:
    """Everything that decides a run's outcome; stored as config.json in its folder.

    Raises:
        ValueError: a bad value, named by its option.
    """

    dist: str = option("moons", "distribution to learn", choices=tuple(DISTRIBUTIONS))
    data: str | None = option(None, "learn your own points instead: a table of two columns (.csv .tsv .txt .dat .npy)")
    columns: tuple[str, ...] | None = option(
        None,
        "which two columns of --data, by name or by number from 1 (default: the only two)",
        nargs=2,
        metavar="NAME",
    )
    drop_outliers: bool = option(
        False, "leave out points of --data over 10 interquartile ranges from the median on either axis"
    )
    bandwidth: float | None = option(
        None,
        "width of the Gaussian around each point of --data, in standard deviations, below 1 (default: the likeliest)",
    )
    objective: str = option(
        "tvm", "what to minimise: TVM, or a relative (tvm_ref/objectives/README.md)", choices=tuple(OBJECTIVES)
    )
    settings: Mapping[str, Any] = option(
        {}, "the objective's own settings, such as power=0 or stops=none (tvm_ref/objectives/README.md)"
    )
    conditional: bool = option(False, "condition on the class (moons, circles and eight_gaussians have classes)")
    w: float = option(1.0, "classifier-free guidance weight, with --conditional (paper, eq. 15)")
    steps: int = option(3000, "training steps")
    batch_size: int = option(512, "number of samples per step")
    width: int = option(64, "number of units per hidden layer")
    depth: int = option(4, "number of hidden layers")
    lr: float = option(7e-3, "peak learning rate of SOAP (Adam in a learned basis): warm-up, then cosine to zero")
    time_sampler: str = option(
        "own", "how times are drawn (paper, sec. 7.3); own: as in the objective's paper, gap* in TVM",
        choices=("own", *TIME_SAMPLERS),
    )  # fmt: skip
    noise_share: float = option(
        0.0, "fraction of samples whose jump starts at t = 1, like one-step sampling (not in the paper)"
    )
    equal_share: float | None = option(
        None, "fraction of samples with t = s, table 4d of the paper (default: the objective's own; 0 in TVM)"
    )
    target_ema: float | None = option(
        None, "decay of the target's weights (default: the objective's own; 0.99 in TVM, paper, table 4b)"
    )
    ema: float = option(0.998, "decay of the weights that are evaluated")
    seed: int = option(0, "seed of the initial weights and of the data")

    def __post_init__(self) -> None:
        if isinstance(self.columns, list):  # JSON has no tuples
            object.__setattr__(self, "columns", tuple(self.columns))
        check_types(self)
        require_at_least(1, steps=self.steps, batch_size=self.batch_size, width=self.width, depth=self.depth)
        for name in ("lr", "w", "bandwidth"):
            value = getattr(self, name)
            require(value is None or 0 < value < float("inf"), f"{flag(name)} must be positive and finite, got {value}")
        for name in ("noise_share", "equal_share", "target_ema", "ema"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 1, f"{flag(name)} must lie in [0, 1], got {value}")
        kind = OBJECTIVES[self.objective]
        settings = read_settings(f"--settings of --objective {self.objective}", kind, self.settings, ("null_label",))
        object.__setattr__(self, "settings", settings)
        able = kind.has_guidance or not self.guided
        require(able, f"--objective {self.objective} has no guidance here: it goes with --w 1")
        try:
            self.sampler()  # raises if the fractions exceed 1 together
            self.make_objective(FlowMap(torch.nn.Module()), null_label=None)  # raises for bad settings
        except ValueError as error:
            raise UserError(str(error)) from error
        require(0 <= self.seed < 2**63, f"--seed must lie in [0, 2^63), got {self.seed}")
        require(self.conditional or not self.guided, "--w needs --conditional")
        require(not (self.conditional and self.data), "--conditional needs classes, and points of --data have none")
        for name in ("bandwidth", "columns", "drop_outliers"):
            require(self.data is not None or not getattr(self, name), f"{flag(name)} goes with --data")

    @property
    def guided(self) -> bool:
        """True if classifier-free guidance is learned: w other than 1."""
        return self.w != 1

    def make_distribution(self) -> GaussianMixture:
        """Make the distribution to learn.

        Raises:
            UserError, OSError: unusable points, or classes of data that have none.
        """
        if self.data is not None:
            return load_points(Path(self.data), self.bandwidth, self.columns, self.drop_outliers)
        distribution = make_distribution(self.dist)
        able = distribution.num_classes or not self.conditional
        require(
            bool(able), f"--conditional needs classes, and {self.dist} has none (moons, circles, eight_gaussians do)"
        )
        return distribution

    def sampler(self) -> TimeSampler:
        """Make the sampler of training's times."""
        sampler = None if self.time_sampler == "own" else TimeSampler(self.time_sampler)
        return OBJECTIVES[self.objective].make_times(sampler, self.equal_share, self.noise_share)

    def make_objective(self, model: Any, null_label: int | None) -> Objective:
        """Make the objective with its settings."""
        return OBJECTIVES[self.objective](model, null_label=null_label, **self.settings)

    @property
    def name(self) -> str:
        """The default name of the run's folder: the data, and the options that differ from plain TVM."""
        parts = [Path(self.data).stem if self.data is not None else self.dist]
        parts += [self.objective] if self.objective != "tvm" else []
        parts += [f"{name}={value}".lower() for name, value in self.settings.items()]
        parts += ["conditional"] if self.conditional else []
        parts += [f"w{self.w:g}"] if self.guided else []
        return "-".join(parts)


def use_one_thread() -> None:
    """Compute on one thread: a second one is no faster on tensors this small, and much slower on a busy machine."""
    torch.set_num_threads(1)
