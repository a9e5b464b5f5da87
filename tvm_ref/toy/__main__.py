"""Train a one-step generator on a 2D distribution, measure it against the exact flow, and draw it.

    python -m tvm_ref.toy --dist moons                    two moons: a minute or two on a laptop
    python -m tvm_ref.toy --data points.csv               your own points: two columns, and samples in their units
    python -m tvm_ref.toy --data points.csv --resume --points 1000    measure that run on 1,000 samples, and write them
    python -m tvm_ref.toy --dist moons --objective fm     flow matching, for comparison
    python -m tvm_ref.toy --dist circles --conditional --w 2
    python -m tvm_ref.toy --dist moons --resume           go on after Ctrl-C, bit for bit

`python -m tvm_ref` lists all commands; tutorials/playground/ makes an interactive page of a finished run.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from tvm_ref.cli.errors import UserError, require, user_files
from tvm_ref.cli.files import require_free
from tvm_ref.cli.options import OneLineParser, add_options, flag, given, require_at_least, run
from tvm_ref.cli.stopping import INTERRUPTED
from tvm_ref.objectives import OBJECTIVES
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.data.points import OwnPoints
from tvm_ref.toy.report.metrics import POINTS, table
from tvm_ref.toy.report.report import write_report
from tvm_ref.toy.run import CHECKPOINT, MARKS, OWN_FILES, Run, load_distribution, read_config


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.toy", __doc__)
    add_options(p, ToyConfig)
    p.add_argument(
        "--points", type=int, default=POINTS, help="number of samples to measure errors on, and to write for own points"
    )
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/toy/NAME, NAME after the options)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
    existing.add_argument("--resume", action="store_true", help="go on with the run that is there, with its options")
    return p


def folder_of(arguments: argparse.Namespace) -> Path:
    """Return the folder of the run that the command line names.

    Raises:
        ValueError: bad options.
    """
    options = given(arguments, ToyConfig)
    require(not {"dist", "data"} <= {*options}, "--dist and --data: a run learns one of them")
    return arguments.out or Path("runs/toy") / ToyConfig(**options).name


def require_same(arguments: argparse.Namespace, folder: Path) -> ToyConfig:
    """Read the configuration of the existing run.

    Raises:
        ValueError: no run there, or options on the command line that are not the run's.
    """
    stored = read_config(folder)
    for name, value in given(arguments, ToyConfig).items():
        if name == "settings":  # strings of the command line become values
            value = dataclasses.replace(stored, settings=value).settings
        if getattr(stored, name) != value:
            raise UserError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
    return stored


def prepare(arguments: argparse.Namespace) -> tuple[Run, torch.Tensor | None]:
    """Make the run that the command line asks for, and if it is resumed, the losses since the log's last line.

    Raises:
        ValueError, OSError: bad options, a folder that is in the way or has nothing to resume, unusable points.
    """
    require_at_least(10, points=arguments.points)
    folder = folder_of(arguments)
    if not arguments.resume:
        require_free(folder, MARKS, ways="--resume, --overwrite", overwrite=arguments.overwrite)
        new = Run(folder, ToyConfig(**given(arguments, ToyConfig)))
        new.create()
        others = sorted(path.name for path in folder.iterdir() if path.name not in OWN_FILES)
        if others:  # results of other commands, or the user's own
            print(f"{folder} keeps what the earlier run did not write: {', '.join(others)}")
        return new, None
    stored = require_same(arguments, folder)
    held = (folder / CHECKPOINT).is_file()
    require(held, f"{folder} holds no checkpoint to resume from; start again with --overwrite")
    old = Run(folder, stored, load_distribution(folder, stored))  # own points come from the run's folder
    return old, old.load()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 130 interrupted; 1 and 2 are exits."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.errors(), user_files():
        this, sums = prepare(arguments)
    if isinstance(this.distribution, OwnPoints):
        print("\n".join(this.distribution.describe()))
    with command.errors("the same command with --resume goes on from the last checkpoint, if there is one"):
        finished = this.train(sums)
    if not finished:
        done = f"step {this.training.step} of {this.config.steps}"
        print(f"stopped by a signal at {done} and saved; measuring what there is (Ctrl-C leaves at once)")
    with command.errors("the same command with --resume measures and draws"):
        metrics = write_report(this, arguments.points)
    print(table(metrics["nfe"]))
    kind = OBJECTIVES[this.config.objective]
    if not kind.learns_jumps:
        print("flow matching learns no jumps: its steps are Euler's, of which it needs many")
    elif kind.one_step_only:
        print("a consistency model is trained for one step only; ignore the pictures of other jumps")
    print(f"{this.training.seconds:.0f} s of training; pictures and metrics: {this.folder}")
    if not finished:
        print("go on: the same command with --resume")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    run(main)
