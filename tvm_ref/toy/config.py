"""The toy's settings: one frozen dataclass, each field with its reason, which is also its --help."""

import argparse
import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch

from tvm_ref.objectives import OBJECTIVES
from tvm_ref.time_samplers import TIME_SAMPLERS, TimeSampler
from tvm_ref.toy.distributions import DISTRIBUTIONS


def _option(default: Any, help: str, **argparse_options: Any) -> Any:
    return field(default=default, metadata={"help": help, **argparse_options})


@dataclass(frozen=True)
class ToyConfig:
    """Everything that decides a run's outcome; stored as config.json in its folder.

    Raises:
        ValueError: a bad value, named by its option.
    """

    dist: str = _option("moons", "distribution to learn", choices=list(DISTRIBUTIONS))
    data: str | None = _option(None, "learn your own points instead: a .csv or .npy file of N x 2 numbers", type=str)
    bandwidth: float | None = _option(
        None, "width of the Gaussian around each point of --data (default: by leave-one-out likelihood)", type=float
    )
    objective: str = _option(
        "tvm", "what to minimise: TVM, or a neighbour that it is compared with", choices=list(OBJECTIVES)
    )
    detach_jvp: bool = _option(False, "TVM without gradients through the JVP: cheaper, biased (paper, sec. 7.4)")
    conditional: bool = _option(False, "condition on the class (moons, circles and eight_gaussians have classes)")
    guidance: float = _option(1.0, "classifier-free guidance weight w, with --conditional (paper, eq. 15)", type=float)
    steps: int = _option(3800, "training steps", type=int)
    batch_size: int = _option(1024, "samples per step", type=int)
    width: int = _option(64, "units per hidden layer of the network", type=int)
    depth: int = _option(4, "hidden layers of the network", type=int)
    lr: float = _option(7e-3, "peak learning rate of SOAP: linear warm-up, then cosine to zero", type=float)
    time_sampler: str = _option("gap*", "how times are drawn (paper, sec. 7.3)", choices=list(TIME_SAMPLERS))
    noise_share: float = _option(
        0.0, "share of samples whose jump starts at t = 1, where one-step sampling does (not in the paper)", type=float
    )
    equal_share: float | None = _option(
        None, "share of samples with t = s, table 4d of the paper (default: 0; 0.75 for meanflow, as in its own paper)",
        type=float,
    )  # fmt: skip
    target_ema: float = _option(0.99, "decay of the target's weights (paper, table 4b)", type=float)
    ema: float = _option(0.998, "decay of the weights that are evaluated", type=float)
    seed: int = _option(0, "seed of the initial weights and of the data", type=int)
    device: str = _option("cpu", "where to train: cpu, cuda, ... (networks this small are fastest on a CPU)", type=str)

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "width", "depth", "seed"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{flag(name)} must be a whole number, got {getattr(self, name)}")
        require_at_least(1, steps=self.steps, batch_size=self.batch_size, width=self.width, depth=self.depth)
        for name in ("lr", "guidance", "bandwidth"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{flag(name)} must be positive and finite, got {value}")
        for name in ("noise_share", "equal_share", "target_ema", "ema"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{flag(name)} must lie in [0, 1], got {value}")
        self.sampler()  # refuses shares that exceed 1 together
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed must lie in [0, 2^63), got {self.seed}")
        if self.guidance != 1 and not self.conditional:
            raise ValueError("--guidance needs --conditional")
        if self.conditional and self.data is not None:
            raise ValueError("--conditional needs classes, and points of --data have none")
        if self.bandwidth and self.data is None:
            raise ValueError("--bandwidth goes with --data")
        if self.detach_jvp and self.objective not in ("tvm", "pid"):
            raise ValueError(f"--detach-jvp does nothing for --objective {self.objective}")
        try:
            torch.zeros(1, device=self.device).item()
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device {self.device} cannot be used here: {str(error).splitlines()[0]}") from None

    def sampler(self) -> TimeSampler:
        """How times are drawn."""
        share_equal = self.equal_share
        if share_equal is None:
            share_equal = 0.75 if self.objective == "meanflow" else 0.0
        return TimeSampler(self.time_sampler, share_equal=share_equal, share_noise=self.noise_share)

    @property
    def name(self) -> str:
        """What the run folder is called by default: the data's name and what differs from plain TVM."""
        parts = [Path(self.data).stem if self.data is not None else self.dist]
        parts += [self.objective] if self.objective != "tvm" else []
        parts += ["detached"] if self.detach_jvp else []
        parts += ["conditional"] if self.conditional else []
        parts += [f"w{self.guidance:g}"] if self.guidance != 1 else []
        return "-".join(parts)


def flag(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming the option, for a value below `least` or NaN."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{flag(name)} must be at least {least}, got {value}")


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and where help is, and exit."""
        print(f"{self.prog}: error: {message} (--help lists all options)", file=sys.stderr)
        sys.exit(2)


def add_options(parser: argparse.ArgumentParser, only: list[str] | None = None) -> None:
    """Add an option per field of ToyConfig, or per field in `only`. Options not given stay absent when parsed."""
    for f in dataclasses.fields(ToyConfig):
        if only is not None and f.name not in only:
            continue
        options = dict(f.metadata)
        text = options.pop("help")
        if isinstance(f.default, bool):
            options["action"] = "store_true"
        elif f.default is not None:
            text += f" (default: {f.default})"
            options.setdefault("metavar", None if "choices" in options else f.name.upper().split("_")[-1])
        options = {k: v for k, v in options.items() if v is not None}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)
