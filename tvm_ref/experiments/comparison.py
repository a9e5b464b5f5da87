"""What a comparison can go on from: its options, step times and the trainings that are done, in comparison.json."""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import write_atomically
from tvm_ref.cli.options import check_types, flag, given, option, require_at_least
from tvm_ref.experiments.methods import ABLATION, METHODS, SETTINGS, method_named, named
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.report.metrics import POINTS
from tvm_ref.toy.run import distribution_of, fingerprint

FILE = "comparison.json"
SHARED = ("dist", "data", "bandwidth", "batch_size", "width", "depth", "time_sampler")


@dataclass(frozen=True)
class Plan:
    """What is compared, and for how long.

    Raises:
        ValueError: a bad value, named by its option.
    """

    methods: tuple[str, ...] = option(
        tuple(METHODS), "of " + ", ".join(map(repr, METHODS)) + ", or names of --objective (default: all)",
        choices=tuple(METHODS), nargs="+", metavar="METHOD", type=method_named,
    )  # fmt: skip
    ablation: bool = option(False, f"in their place, from MeanFlow to TVM: {', '.join(ABLATION)}")
    steps: int = option(1200, "training time of each run, in steps of TVM")
    seeds: int = option(3, "seeds per method")
    rates: tuple[float, ...] = option((0.003, 0.01, 0.03), "learning rates to sweep first", nargs="+")
    points: int = option(POINTS, "samples that errors are measured on")

    def __post_init__(self) -> None:
        check_types(self)
        require_at_least(1, steps=self.steps, seeds=self.seeds)
        require_at_least(10, points=self.points)
        if not all(0 < rate < float("inf") for rate in self.rates):
            raise UserError("--rates must be positive and finite")

    @property
    def changes(self) -> dict[str, dict[str, Any]]:
        """What each method that is compared changes."""
        return ABLATION if self.ablation else {name: METHODS[name] for name in self.methods}

    def configs(self, base: ToyConfig) -> dict[str, ToyConfig]:
        """Make the configuration of each method with each of its settings, by name, from what all have in common."""
        return {
            named(name, setting): dataclasses.replace(base, **changes | setting)
            for name, changes in self.changes.items()
            for setting in SETTINGS.get(name, ({},))
        }


@dataclass
class Stored:
    """What comparison.json holds.

    Attributes:
        base: what all trainings have in common; of its fields those in SHARED are stored.
        plan: what is compared.
        data: a hash of the distribution, as points of --data may change.
        step_seconds: measured CPU seconds of a training step, by name.
        trainings: the result of each training that is done; it is decided by the configuration.
    """

    base: ToyConfig
    plan: Plan
    data: str
    step_seconds: dict[str, float]
    trainings: dict[ToyConfig, dict[str, Any]] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write the file, so that a reader, or a crash, sees the old content or the new one."""
        content = {
            "base": {name: getattr(self.base, name) for name in SHARED},
            "plan": dataclasses.asdict(self.plan),
            "data": self.data,
            "step_seconds": self.step_seconds,
            "trainings": [
                {"config": dataclasses.asdict(config), "result": result} for config, result in self.trainings.items()
            ],
        }
        write_atomically(folder / FILE, json.dumps(content) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Stored":
        """Read the file.

        Raises:
            ValueError: no comparison there, or a file that is not of this program.
        """
        try:
            content = json.loads((folder / FILE).read_text())
            plan: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in content["plan"].items()}
            done = {ToyConfig(**training["config"]): training["result"] for training in content["trainings"]}
            return cls(ToyConfig(**content["base"]), Plan(**plan), content["data"], content["step_seconds"], done)
        except FileNotFoundError:
            raise UserError(f"{folder} holds no comparison to resume (no {FILE})") from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / FILE} is not a comparison of this program: {error}") from None

    @classmethod
    def resume(cls, folder: Path, arguments: argparse.Namespace) -> "Stored":
        """Read the comparison that is to go on.

        Raises:
            ValueError, OSError: see read; options on the command line, methods or data that are not the comparison's.
        """
        stored = cls.read(folder)
        for config, names in ((stored.base, SHARED), (stored.plan, [f.name for f in dataclasses.fields(Plan)])):
            for name, value in given(arguments, type(config)).items():
                kept = getattr(config, name)
                if name in names and kept != value:
                    shown = " ".join(map(str, kept)) if isinstance(kept, tuple) else kept
                    raise UserError(f"--resume keeps a comparison's options: {folder} has {flag(name)} {shown}")
        if not {*stored.plan.configs(stored.base)} < {*stored.step_seconds}:
            raise UserError(f"{folder} compares what another version of this program does: start again (--overwrite)")
        if stored.data != fingerprint(distribution_of(stored.base)):
            raise UserError(f"{folder} compares on other data than --data {stored.base.data} holds now")
        return stored
