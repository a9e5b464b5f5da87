"""Train a DiT to generate in one step by Terminal Velocity Matching.

    torchrun imagenet/train.py                                       digits, on a laptop, in minutes
    torchrun imagenet/train.py --resume                              go on with it, bit for bit
    torchrun imagenet/train.py cifar10 --data-path DATA --download
    torchrun --nproc-per-node 8 imagenet/train.py imagenet256-w2 --data-path LATENTS
    torchrun --nproc-per-node 8 imagenet/train.py synthetic          throughput, without data

With one process, `python` serves as well as `torchrun`.
"""

import argparse
import dataclasses
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from imagenet import checkpoints, parallel
from imagenet.data import Batches, load_data, loader
from imagenet.parallel import World, on_first
from imagenet.presets import PRESETS, RESUMABLE, Config
from imagenet.run import Run, check_new, stored_config
from imagenet.training import Training
from tvm_ref.command_line import OneLineParser, add_options, option, require_at_least
from tvm_ref.interruption import Interruption
from tvm_ref.objectives import TERMS

THREADS = 1  # on a CPU, unless OMP_NUM_THREADS says more, which helps digits little and hurts much on busy cores


@dataclasses.dataclass(frozen=True)
class Options:
    """How and where to run, beside the configuration."""

    out: str | None = option(None, "folder of the run (default: runs/imagenet/PRESET)", type=str)
    resume: bool = option(False, "go on with the run in that folder; begin it if there is none")
    data_path: str | None = option(None, "folder of cifar10 or of latents", type=str)
    download: bool = option(False, "fetch cifar10 if it is not there")
    device: str | None = option(None, "cpu, cuda, ... (default: the GPU if there is one)", type=str)
    workers: int = option(0, "processes that read ahead", type=int)
    log_every: int = option(20, "steps between lines of train.jsonl", type=int)
    sample_every: int = option(200, "steps between sample grids", type=int)
    save_every: int = option(500, "steps between checkpoints", type=int)
    keep: int = option(3, "checkpoints that are kept, the newest", type=int)

    def __post_init__(self) -> None:
        require_at_least(0, workers=self.workers)
        for name in ("log_every", "sample_every", "save_every", "keep"):
            require_at_least(1, **{name: getattr(self, name)})


def parser() -> OneLineParser:
    """The command line."""
    lines = ["presets, and where they differ from digits:"]
    for name, preset in PRESETS.items():
        changed = [f for f in dataclasses.fields(Config) if getattr(preset, f.name) != f.default]
        lines.append(f"  {name}: " + (", ".join(f"{f.name} {getattr(preset, f.name)}" for f in changed) or "default"))
    p = OneLineParser(
        "train.py",
        usage="train.py [PRESET] [--option value ...]",
        description=__doc__,
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("preset", nargs="?", default="digits", choices=tuple(PRESETS), help="the default is digits")
    add_options(p.add_argument_group("the run"), Options)
    add_options(p.add_argument_group("the configuration (defaults are those of digits)"), Config)
    return p


def prepare(preset: str, given: dict[str, Any], options: Options, world_size: int) -> tuple[Config, Path, bool]:
    """Configuration, folder, and whether it goes on with a run.

    Raises:
        ValueError, OSError: bad options, or a folder that is in the way.
    """
    config = dataclasses.replace(PRESETS[preset], **given)
    folder = Path(options.out or f"runs/imagenet/{preset}")
    resumed = options.resume and (folder / checkpoints.CONFIG).exists()
    if resumed:
        of_preset = {} if preset == "digits" else dataclasses.asdict(PRESETS[preset])  # digits may be unsaid
        config = stored_config(folder, {k: v for k, v in of_preset.items() if k not in RESUMABLE} | given)
    else:
        check_new(folder)
    if config.batch_size % (world_size * config.accumulate):
        raise ValueError(
            f"--batch-size {config.batch_size} is no multiple of {world_size} processes times "
            f"--accumulate {config.accumulate}"
        )
    if config.parallel == "fsdp":
        parallel.check_version()
    return config, folder, resumed


def begin(preset: str, given: dict[str, Any], options: Options, world: World) -> Run:
    """The run that the command line asks for, at the step where it goes on.

    Raises:
        ValueError, OSError: bad options, missing data, a folder that is in the way or cannot be resumed.
    """
    plan = on_first(world, lambda: prepare(preset, given, options, world.size))
    config, folder, resumed = world.tell(plan)
    data = on_first(world, lambda: load_data(config, options.data_path, download=options.download))
    if data is None:
        data = load_data(config, options.data_path)
    run = Run(folder, Training(config, world), data, options.keep)
    on_first(world, run.create)
    if resumed:
        run.load()
    elif options.resume and world.first:
        print(f"{folder} holds no run to resume: beginning one")
    return run


def train(run: Run, options: Options) -> bool:
    """Train to the end, or until any process is asked to stop; returns whether it came to the end. Saves either way.

    Raises:
        FloatingPointError: a loss that is NaN or infinite, with step, term and rank. The last checkpoint stays.
        OSError: a checkpoint that could not be written.
    """
    training, config, world = run.training, run.training.config, run.world
    batches = Batches(config, run.data, world.rank, world.size)
    begun, first = time.perf_counter(), training.step
    bar = tqdm(
        total=config.steps, initial=first, unit="step", desc="training", file=sys.stdout, mininterval=0.5,
        disable=not world.first,
    )  # fmt: skip
    run.open_log()
    saved, stopped = first, False  # a run that is resumed has its first step's checkpoint
    with Interruption() as interruption, bar:
        for batch in loader(batches, first, options.workers, pin=world.device.type == "cuda"):
            told = training.train_step(batch, stop=interruption.requested)
            step, elapsed = training.step, time.perf_counter() - begun
            run.note(told, run.before + elapsed)
            bar.update()
            if step % options.log_every == 0:
                line = run.log(told, (step - first) * config.batch_size / elapsed)
                bar.set_postfix({k: f"{line[k]:.3g}" for k in (*TERMS, "images_per_second", "gib")}, refresh=False)
            if step % options.sample_every == 0:
                run.draw(f"samples/{step:08d}.png", 1)
            if step % options.save_every == 0:
                run.save()
                saved = step
            if told.asked_to_stop:
                stopped = True
                break
    run.close_log()
    if saved != training.step:
        run.save()
    return not stopped or training.step == config.steps


def main(argv: list[str] | None = None, started: float | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 1 failed, 2 bad input, 130 interrupted.

    `started` is when the program began (seconds since the epoch), if that was before this call.
    """
    started = time.time() if started is None else started
    command = parser()
    given = vars(command.parse_args(argv))
    preset = given.pop("preset")
    names = {f.name for f in dataclasses.fields(Options)}
    try:
        options = Options(**{name: given.pop(name) for name in list(given) if name in names})
        world = parallel.start(options.device)
    except ValueError as error:
        command.error(str(error))
    try:
        return _main(command, preset, given, options, world, started)
    finally:
        parallel.stop()


def _main(
    command: OneLineParser, preset: str, given: dict[str, Any], options: Options, world: World, started: float
) -> int:
    if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(THREADS)
    try:
        run = begin(preset, given, options, world)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:  # the last: a network beyond the memory
        command.error(str(error).splitlines()[0])
    again = "the same command with --resume goes on"
    try:
        if not train(run, options):
            _say(world, f"stopped at step {run.training.step}, and saved: {again}")
            return 130
        metrics = run.report(started)
    except KeyboardInterrupt:
        _say(world, f"stopped at once; from the last checkpoint, {again}", error=True)
        return 130
    except (FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        _say(world, f"{command.prog}: error: {str(error).splitlines()[0]}", error=True)
        return 1
    for nfe, figures in metrics.get("nfe", {}).items():
        _say(world, f"{nfe} NFE: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
    _say(world, f"{run.seconds:.0f} s of training; weights, samples and figures: {run.folder}")
    return 0


def _say(world: World, text: str, *, error: bool = False) -> None:
    if world.first:
        print(text, file=sys.stderr if error else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main(started=psutil.Process().create_time()))
