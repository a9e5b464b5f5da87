"""Train a DiT to generate in one step by Terminal Velocity Matching.

    torchrun imagenet/train.py                                       digits, on a laptop, in minutes
    torchrun imagenet/train.py --resume                              continue that run, bit for bit
    torchrun imagenet/train.py --init runs/imagenet/fm --out runs/imagenet/fm-then-tvm     start from its weights
    torchrun imagenet/train.py fashion --data-path DATA                Fashion-MNIST: an evening on a CPU
    torchrun imagenet/train.py cifar10 --data-path DATA
    torchrun imagenet/train.py folder --data-path PICTURES             your own: a folder per class, or one for all
    torchrun --nproc-per-node 8 imagenet/train.py imagenet256-w2 --data-path LATENTS --accumulate 16      8 x 80 GB
    torchrun --nproc-per-node 8 imagenet/train.py synthetic --accumulate 16      throughput, without data

For one process `python` does the same as `torchrun`, without the traceback that torchrun adds on Ctrl-C.
"""

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from imagenet.config import OF_DATA, PRESETS, RESUMABLE, Config
from imagenet.cost.memory import shortage
from imagenet.data.batches import Batches, loader
from imagenet.data.image_sets import Data, fit_to_data, load_data, provenance_of
from imagenet.data.pictures import INDEX, PIXELS, read_folder
from imagenet.data.provenance import Provenance
from imagenet.data.vae import load_vae
from imagenet.model import distributed
from imagenet.model.distributed import World
from imagenet.model.parallelize import check_version
from imagenet.training.run import Run
from imagenet.training.step import Training
from imagenet.weights import CONFIG, WEIGHTS, checkpoints, read_config, read_provenance
from tvm_ref.cli.errors import UserError, require, user_files
from tvm_ref.cli.files import hold, require_free
from tvm_ref.cli.options import OneLineParser, add_options, flag, given, option, require_at_least
from tvm_ref.cli.options import run as run_command
from tvm_ref.cli.progress import progress
from tvm_ref.cli.stopping import INTERRUPTED, Interruption, SaveRequests
from tvm_ref.objectives import OBJECTIVES, TERMS

GO_ON = "the same command with --resume continues"
DEFAULT = "digits"  # the preset if none is given
THREADS = 1  # on a CPU, unless OMP_NUM_THREADS is set: more threads gain little on digits and cost much on busy cores

Plan = tuple[Config, bool, Provenance]  # (configuration, whether the run is resumed, where its data come from)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options besides the configuration: folders, device, logging, checkpoints."""

    out: str | None = option(None, "folder of the run (default: runs/imagenet/PRESET)")
    resume: bool = option(False, "continue the run in that folder; start one if there is none")
    data_path: str | None = option(
        None, "folder of pictures or latents, or for fashion and cifar10, downloaded if missing"
    )
    device: str | None = option(None, "cpu, cuda, ... (default: the GPU if there is one)")
    workers: int = option(0, "number of processes that load batches ahead")
    log_every: int = option(20, "number of steps between lines of train.jsonl")
    save_every: int = option(250, "steps between checkpoints, each with evaluation weights and a grid of samples")
    keep: int = option(3, "number of newest checkpoints to keep")

    def __post_init__(self) -> None:
        require_at_least(0, workers=self.workers)
        require_at_least(1, log_every=self.log_every, save_every=self.save_every, keep=self.keep)


def parser() -> OneLineParser:
    """Build the command line."""
    lines, default = ["presets, and where they differ from digits:"], Config()
    for name, preset in PRESETS.items():
        values = {f.name: getattr(preset, f.name) for f in dataclasses.fields(Config)}
        changed = [f"{name} {value}" for name, value in values.items() if value != getattr(default, name)]
        lines.append(f"  {name}: " + (", ".join(changed) or "default"))
    usage = "train.py [PRESET] [--option value ...]"
    p = OneLineParser("train.py", __doc__, usage=usage, epilog="\n".join(lines))
    p.add_argument("preset", nargs="?", choices=tuple(PRESETS), help="default: digits; with --resume, the run's own")
    add_options(p.add_argument_group("the run"), Options)
    names = [f.name for f in dataclasses.fields(Config) if f.name not in OF_DATA]
    add_options(p.add_argument_group("the configuration (defaults are those of digits)"), Config, names)
    return p


def stored_config(folder: Path, changes: dict[str, Any]) -> Config:
    """Read the configuration of the run in a folder, and apply `changes` that a resumed run allows.

    Raises:
        UserError: no run there, or a change that would make it another run.
    """
    stored = read_config(folder)
    if "steps" in changes:
        _check_steps(folder, stored, changes["steps"])
    for name, value in changes.items():
        if name not in (*RESUMABLE, "steps") and getattr(stored, name) != value:
            option = name if name in OF_DATA else flag(name)
            raise UserError(f"--resume keeps a run's options: {folder} has {option} {getattr(stored, name)}")
    return dataclasses.replace(stored, **changes)


def _check_steps(folder: Path, stored: Config, steps: int) -> None:
    """Raise UserError unless a run may be resumed to `steps`: its own, or more if nothing depends on their number."""
    shaped = [f"--schedule {stored.schedule}"] * (stored.schedule != "constant")
    shaped += [f"--objective {stored.objective}"] * OBJECTIVES[stored.objective].has_curriculum
    if steps != stored.steps and shaped:
        reason = f"its {shaped[0]} was shaped by them"
        instead = f"--init {folder} with another --out trains on from its weights"
        raise UserError(f"--resume keeps a run's options: {folder} has --steps {stored.steps}, as {reason}; {instead}")
    more = steps >= stored.steps
    require(more, f"--resume can raise a run's --steps, not lower them: {folder} has --steps {stored.steps}")


def make_plan(
    preset: str | None, changes: dict[str, Any], out: Path, options: Options, world_size: int
) -> tuple[Plan, Data]:
    """Choose the configuration of a run, say whether it is resumed, and load its data; for the first process.

    Args:
        preset: a key of PRESETS; if None, that of the resumed run, else digits.
        changes: fields of the configuration that replace the preset's.
        out: folder of the run.
        options: how and where to run.
        world_size: number of processes.

    Raises:
        UserError: bad values, no data, a folder that holds something else, latents of another autoencoder.
    """
    resumed = options.resume and (out / CONFIG).exists()
    base = read_config(out) if resumed and preset is None else PRESETS[preset or DEFAULT]
    config = dataclasses.replace(base, **changes)
    changes = {name: getattr(config, name) for name in changes}  # Config turns the strings of --settings into values
    if resumed:
        of_preset = {} if preset is None else dataclasses.asdict(PRESETS[preset])
        kept = (*RESUMABLE, "steps", "init", "input_size", "in_channels", "classes")  # stay as stored, unless given
        config = stored_config(out, {k: v for k, v in of_preset.items() if k not in kept} | changes)
    else:
        lost = not (checkpoints(out) or (out / WEIGHTS).exists())  # it failed in its first steps: nothing to keep
        if lost and (out / CONFIG).exists():
            read_config(out)  # of a run, and not of something else
        require_free(out, (CONFIG,), ways="--resume", overwrite=lost, leftovers=(INDEX, PIXELS))
        mirrored = not config.flip or config.data in ("folder", "cifar10")
        require(mirrored, f"--flip is for pictures of your own, not for {config.data}")
        if config.data == "latents" and options.data_path is not None:
            config = dataclasses.replace(fit_to_data(config, options.data_path), **changes)
    shares = f"{world_size} processes times --accumulate {config.accumulate}"
    divides = config.batch_size % (world_size * config.accumulate) == 0
    require(divides, f"--batch-size {config.batch_size} is no multiple of {shares}")
    if config.parallel == "fsdp":
        check_version()
    if config.data == "folder" and not (resumed and (out / INDEX).exists()):
        read_pictures_of(options.data_path, config.input_size, out)
        config = config if resumed else fit_to_data(config, out)
    data = load_data(config, data_folder(config, out, options))
    provenance = provenance_of(config, data, options.data_path)
    earlier = str(out) if resumed else config.init  # a resumed run has no use for `init`: it has a checkpoint
    if earlier is not None and (before := read_provenance(earlier)) is not None:
        if resumed and config.data == "folder":  # its pictures were read when the run started
            provenance = dataclasses.replace(provenance, path=before.path)
        before.check_latents(provenance, f"{earlier} was trained on other latents than --data-path holds")
    return (config, resumed, provenance), data


def read_pictures_of(data_path: str | None, size: int, out: Path) -> None:
    """Read the pictures of --data-path into the folder of a run.

    Raises:
        UserError: no pictures there, or --out lies among them.
    """
    if data_path is None or not Path(data_path).is_dir():
        raise UserError(f"the preset folder needs --data-path, a folder of pictures that exists; got {data_path}")
    if out.resolve().is_relative_to(Path(data_path).resolve()):
        raise UserError(f"--out {out} lies inside {data_path}, where its samples would count as pictures")
    out.mkdir(parents=True, exist_ok=True)
    read_folder(Path(data_path), size, out)


def data_folder(config: Config, out: Path, options: Options) -> str | Path | None:
    """Return the folder to read the data of a run from; pictures have been copied into the run's own."""
    return out if config.data == "folder" else options.data_path


def load_decoder(provenance: Provenance, world: World) -> nn.Module | None:
    """Load the autoencoder that made the latents; None if there is none or it cannot be loaded."""
    name = provenance.autoencoder
    if name is None:
        return None
    try:
        vae = world.on_first(lambda: load_vae(name)) or load_vae(name)  # the first process may have to download it
    except UserError as error:
        if world.first:
            print(f"{error}; grids show latents as they are")
        return None
    return vae.to(world.device)


def folder_of(preset: str | None, options: Options) -> Path:
    """Return the folder of a run: --out, or one named after the preset."""
    return Path(options.out or f"runs/imagenet/{preset or DEFAULT}")


def begin(preset: str | None, changes: dict[str, Any], options: Options, world: World) -> tuple[Run, Data]:
    """Make a run or restore the one to resume, and load its data; see make_plan.

    Raises:
        UserError: bad options, missing data, a folder that holds something else or cannot be resumed.
    """
    out = folder_of(preset, options)
    # the first process decides and may download or convert data; the others then get its plan, and load the data
    made = world.on_first(lambda: make_plan(preset, changes, out, options, world.size))
    config, resumed, provenance = world.broadcast(made and made[0])
    data = made[1] if made is not None else load_data(config, data_folder(config, out, options))
    if world.first and (warning := shortage(config, world)) is not None:
        print(warning, file=sys.stderr)
    vae = load_decoder(provenance, world)
    run = Run(out, Training(config, world), provenance, options.keep, vae)
    run.start()
    world.on_first(run.create)
    if not resumed and options.resume and world.first:
        print(f"{out} holds no run to resume: starting one")
    return run, data


def train(run: Run, data: Data, options: Options) -> bool:
    """Train to the last step, or until any process is asked to stop, and save; return whether it is finished.

    Raises:
        FloatingPointError: a loss that is NaN or infinite; names step, term and rank. The last checkpoint stays.
        OSError: a checkpoint that could not be written.
    """
    training, config, world = run.training, run.training.config, run.world
    batches = Batches(config, data, world.rank, world.size)
    first = saved = training.step  # a resumed run starts at a checkpoint
    stopped = False
    bar = progress(
        total=config.steps, initial=first, unit="step", desc="training", file=sys.stdout, mininterval=0.5,
        disable=not world.first,
    )  # fmt: skip
    run.log.open()
    ahead = loader(batches, first, options.workers, pin=world.device.type == "cuda")
    with (
        contextlib.closing(run.log), contextlib.closing(ahead), Interruption() as interruption,
        SaveRequests() as requests, run.saver, bar,
    ):  # fmt: skip
        for batch in run.log.timed(ahead):
            metrics = training.train_step(batch)
            step = training.step
            # if any process is asked to stop or save, all do after the same step
            stop, save = world.any(interruption.requested or run.saver.failed, requests.take())
            run.log.note(metrics)
            bar.update()
            if step % options.log_every == 0 or step == config.steps:
                line = run.log.write(metrics)
                shown = (*TERMS, "images_per_second", "data_wait", "gib")
                bar.set_postfix({k: f"{line[k]:.3g}" for k in shown}, refresh=False)
            if step % options.save_every == 0 or save:
                run.save()
                run.draw_grid(f"samples/{step:08d}.png")
                saved = step
            if stop:
                stopped = True
                break
        if saved != training.step:
            run.save()
    return not stopped or training.step == config.steps


@contextlib.contextmanager
def hint_at_memory() -> Iterator[None]:
    """Add a note to an OutOfMemoryError: the options that need less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note("smaller micro-batches (--accumulate) or recomputed blocks (--checkpointing) need less memory")
        raise


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status: 0 if finished, 130 if stopped."""
    started = time.perf_counter()
    command = parser()
    arguments = command.parse_args(argv)
    with contextlib.ExitStack() as stack:
        with command.errors(), user_files():
            options = Options(**given(arguments, Options))
            world = stack.enter_context(distributed.process_group(options.device))
            if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(THREADS)
            folder = folder_of(arguments.preset, options)
            world.on_first(lambda: stack.enter_context(hold(folder)))
            run, data = begin(arguments.preset, given(arguments, Config), options, world)
        with command.errors(GO_ON), hint_at_memory():
            finished = train(run, data, options)
            scores = run.write_report(time.perf_counter() - started).get("nfe", {}) if finished else {}
    if world.first and not finished:
        print(f"stopped at step {run.training.step}, and saved: {GO_ON}")
    elif world.first:
        for nfe, row in scores.items():
            print(f"{nfe} NFE: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
        print(f"{run.log.seconds:.0f} s of training; weights, samples and scores: {run.folder}")
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    run_command(main)
