"""Train a one-step generator on a 2D distribution, measure it against the exact flow, and draw it.

    python -m tvm_ref.toy --dist moons                    two moons: under a minute on a laptop
    python -m tvm_ref.toy --data points.csv               your own points
    python -m tvm_ref.toy --dist moons --objective fm     flow matching, for comparison
    python -m tvm_ref.toy --dist circles --conditional --w 2
    python -m tvm_ref.toy --dist moons --resume           go on after Ctrl-C, bit for bit

All objectives on equal terms: python -m tvm_ref.toy.compare    Quality over seeds: python -m tvm_ref.toy.seeds
Speed: python -m tvm_ref.toy.benchmark    The Wasserstein bound of a run: python -m tvm_ref.bound
"""

import argparse
from pathlib import Path

import torch

from tvm_ref.command_line import OneLineParser, add_options, flag, given, require_at_least, require_free, run
from tvm_ref.interruption import INTERRUPTED
from tvm_ref.toy.config import ToyConfig, use_one_thread
from tvm_ref.toy.metrics import POINTS, table
from tvm_ref.toy.run import MARKS, Run, read_config


def parser() -> OneLineParser:
    """Make the command line."""
    p = OneLineParser("python -m tvm_ref.toy", __doc__)
    add_options(p, ToyConfig)
    p.add_argument("--points", type=int, default=POINTS, help="samples that every figure is measured on")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/toy/NAME, NAME after the options)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run that is there, with its own options"
    )
    return p


def prepare(arguments: argparse.Namespace) -> tuple[Run, torch.Tensor | None]:
    """Make the run that the command line asks for; where it is resumed, with the losses since the log's last line.

    Raises:
        ValueError, OSError: bad options, a folder that is in the way or has nothing to resume, unusable points.
    """
    options = given(arguments, ToyConfig)
    require_at_least(10, points=arguments.points)
    config = ToyConfig(**options)
    folder = arguments.out or Path("runs/toy") / config.name
    if not arguments.resume:
        require_free(folder, MARKS, ways="--resume, --overwrite", overwrite=arguments.overwrite)
        new = Run(folder, config)
        new.create()
        return new, None
    stored = read_config(folder)
    for name, value in options.items():
        if getattr(stored, name) != value:
            raise ValueError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
    if not (folder / "checkpoint.pt").is_file():
        raise ValueError(f"{folder} holds no checkpoint to resume from; start again with --overwrite")
    old = Run(folder, stored)
    return old, old.load()


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 130 interrupted; 1 and 2 are exits."""
    command = parser()
    arguments = command.parse_args(argv)
    use_one_thread()
    with command.bad_input():
        this, sums = prepare(arguments)
    metrics = this.results(arguments.points) if this.training.step == this.config.steps else None
    if metrics is not None:
        print(f"{this.folder} was finished at step {this.training.step}, and measured:")
    else:
        with command.failures("the same command with --resume goes on from the last checkpoint, if there is one"):
            finished = this.train(sums)
        if not finished:
            print(f"stopped at step {this.training.step}; what there is so far:")
        print("measuring and drawing")
        with command.failures("the same command with --resume measures and draws"):
            metrics = this.report(arguments.points)
    print(table(metrics["nfe"]))
    seconds = metrics["seconds"]
    spent = f"{seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all"
    print(f"{spent}; pictures and figures: {this.folder}")
    if this.training.step < this.config.steps:
        print("go on: the same command with --resume")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    run(main)
