"""Train a one-step generator on a 2D distribution, measure it against the exact flow, and draw it.

    python -m tvm_ref.toy --dist moons                    two moons: under a minute on a laptop
    python -m tvm_ref.toy --data points.csv               your own points
    python -m tvm_ref.toy --dist moons --objective fm     flow matching, for comparison
    python -m tvm_ref.toy --dist circles --conditional --guidance 2
    python -m tvm_ref.toy --dist moons --resume           go on after Ctrl-C, bit for bit

All objectives on equal terms: python -m tvm_ref.toy.compare    Quality over seeds: python -m tvm_ref.toy.seeds
Speed: python -m tvm_ref.toy.benchmark    The Wasserstein bound of a run: python -m tvm_ref.bound
"""

import argparse
import sys
import time
from pathlib import Path

import psutil
import torch

from tvm_ref.toy.config import OneLineParser, ToyConfig, add_options, flag, require_at_least
from tvm_ref.toy.run import Run, read_config

THREADS = 2  # more do not help tensors this small, and cost dearly where other programs share the cores
OWN_FILES = (  # what a run writes, and --overwrite may remove
    "config.json", "train.jsonl", "checkpoint.pt", "model.safetensors", "metrics.json",
    "snapshots.safetensors",
    "samples.png", "trajectories.png", "map.png", "losses.png", "bound.json", "bound.png",
    "page.html", "animation.gif",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = OneLineParser(
        "python -m tvm_ref.toy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_options(p)
    p.add_argument("--points", type=int, default=2000, help="samples that every figure is measured on (default: 2000)")
    p.add_argument("--out", type=Path, help="folder of the run (default: runs/toy/NAME, NAME after the options)")
    existing = p.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace a run that is already there")
    existing.add_argument(
        "--resume", action="store_true", help="go on with the run that is there, with its own options"
    )
    return p


def prepare(arguments: argparse.Namespace, started: float) -> tuple[Run, bool]:
    """The run that the command line asks for, and whether it goes on from a checkpoint.

    Raises:
        ValueError, OSError: bad options, a folder that is in the way or has nothing to resume, unusable points.
    """
    given = vars(arguments).copy()
    points, out, overwrite, resume = (given.pop(name) for name in ("points", "out", "overwrite", "resume"))
    require_at_least(10, points=points)
    config = ToyConfig(**given)
    folder = out or Path("runs/toy") / config.name
    if resume:
        stored = read_config(folder)
        for name, value in given.items():
            if getattr(stored, name) != value:
                raise ValueError(f"--resume keeps a run's options: {folder} has {flag(name)} {getattr(stored, name)}")
        if not (folder / "checkpoint.pt").is_file():
            raise ValueError(f"{folder} holds no checkpoint to resume from; start again with --overwrite")
        return Run(folder, stored, started), True
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    if folder.exists() and any(folder.iterdir()):
        if not ((folder / "config.json").is_file() and (folder / "train.jsonl").is_file()):
            raise ValueError(f"{folder} holds something that is no run: choose another --out")
        if not overwrite:
            raise ValueError(f"{folder} already holds a run: --resume, --overwrite, or another --out")
        for name in OWN_FILES:
            if (folder / name).is_dir():
                raise ValueError(f"{folder / name} is a folder, where a run writes a file: choose another --out")
    run = Run(folder, config, started)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)
    run.create()
    return run, False


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.

    `started` is when the program began (seconds since the epoch), if that was before this call.
    """
    started = time.time() if started is None else started
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    command = parser()
    arguments = command.parse_args(argv)
    try:
        run, resumed = prepare(arguments, started)
        sums = run.load() if resumed else None
    except (ValueError, OSError) as error:
        command.error(str(error))
    except (RuntimeError, MemoryError) as error:  # a network that does not fit in memory
        command.error(str(error).splitlines()[0])
    try:
        finished = run.train(sums)
    except (FloatingPointError, OSError, RuntimeError, MemoryError) as error:
        what = "training diverged at " if isinstance(error, FloatingPointError) else ""
        print(f"{command.prog}: error: {what}{str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if not finished:
        print(f"stopped at step {run.training.step}; what there is so far:")
    try:
        metrics = run.report(arguments.points)
    except KeyboardInterrupt:
        print("\nstopped before everything was measured and drawn: the same command with --resume does that")
        return 130
    except OSError as error:
        print(f"{command.prog}: error: {error}; once mended, the same command with --resume goes on", file=sys.stderr)
        return 1
    seconds = metrics["seconds"]
    print(
        f"{seconds['training']:.0f} s of training, {seconds['total']:.0f} s in all; pictures and figures: {run.folder}"
    )
    if not finished:
        print("go on: the same command with --resume")
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main(started=psutil.Process().create_time()))
