"""Train a DiT to generate in one step by Terminal Velocity Matching.

    torchrun imagenet/train.py                                       digits, on a laptop, in minutes
    torchrun imagenet/train.py --resume                              go on with it, bit for bit
    torchrun imagenet/train.py --init runs/imagenet/fm --out runs/imagenet/fm-then-tvm     from given weights
    torchrun imagenet/train.py cifar10 --data-path DATA --download
    torchrun --nproc-per-node 8 imagenet/train.py imagenet256-w2 --data-path LATENTS --accumulate 16      8 x 80 GB
    torchrun --nproc-per-node 8 imagenet/train.py synthetic --accumulate 16      throughput, without data

With one process, `python` serves as well as `torchrun`, which ends with a traceback of its own on Ctrl-C.
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

from imagenet import distributed
from imagenet.config import PRESETS, RESUMABLE, Config
from imagenet.data.batches import Batches, loader
from imagenet.data.fingerprints import fingerprint
from imagenet.data.image_sets import Data, load_data, provenance_of
from imagenet.data.provenance import Provenance
from imagenet.data.vae import load_vae
from imagenet.distributed import World
from imagenet.metrics.fid import Judge, make_judge
from imagenet.model.parallelize import check_version
from imagenet.training.log import check_wandb
from imagenet.training.run import Run, saved_nothing, stored_config
from imagenet.training.step import Training
from imagenet.weights import CONFIG, read_provenance
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free
from tvm_ref.cli.options import OneLineParser, add_options, given, option, require_at_least
from tvm_ref.cli.options import run as run_command
from tvm_ref.cli.progress import progress
from tvm_ref.cli.stopping import INTERRUPTED, Interruption, SaveRequests
from tvm_ref.objectives import TERMS

LEAST = 10  # images to measure
GO_ON = "the same command with --resume goes on"
THREADS = 1  # on a CPU, unless OMP_NUM_THREADS says more, which helps digits little and hurts much on busy cores


@dataclasses.dataclass(frozen=True)
class Options:
    """How and where to run, beside the configuration."""

    out: str | None = option(None, "folder of the run (default: runs/imagenet/PRESET)")
    resume: bool = option(False, "go on with the run in that folder; begin it if there is none")
    data_path: str | None = option(None, "folder of cifar10 or of latents")
    download: bool = option(False, "fetch cifar10 if it is not there")
    device: str | None = option(None, "cpu, cuda, ... (default: the GPU if there is one)")
    workers: int = option(0, "processes that read ahead")
    log_every: int = option(20, "steps between lines of train.jsonl")
    sample_every: int = option(200, "steps between sample grids")
    save_every: int = option(500, "steps between checkpoints")
    keep: int = option(3, "checkpoints that stay, the newest; each holds its evaluation weights")
    vae: str | None = option(None, "autoencoder that shows latents as pictures (default: the one that made them)")
    evaluate_every: int = option(0, "steps between measurements of the evaluation weights; 0: none")
    evaluate_count: int = option(10_000, "images for each measurement (published figures use 50,000)")
    evaluate_steps: int = option(1, "network evaluations per image that is measured")
    reference: str | None = option(None, "mu and sigma of real images, .npz or .pkl, for FID; digits need none")
    inception: str | None = option(None, "file of Inception's weights, for FID (default: where torch.hub keeps it)")
    wandb: str | None = option(None, "log to this project of Weights & Biases as well")

    def __post_init__(self) -> None:
        require_at_least(0, workers=self.workers, evaluate_every=self.evaluate_every)
        for name in ("log_every", "sample_every", "save_every", "keep", "evaluate_steps"):
            require_at_least(1, **{name: getattr(self, name)})
        require_at_least(LEAST, evaluate_count=self.evaluate_count)


def parser() -> OneLineParser:
    """Build the command line."""
    lines = ["presets, and where they differ from digits:"]
    for name, preset in PRESETS.items():
        changed = [f for f in dataclasses.fields(Config) if getattr(preset, f.name) != getattr(Config(), f.name)]
        lines.append(f"  {name}: " + (", ".join(f"{f.name} {getattr(preset, f.name)}" for f in changed) or "default"))
    usage = "train.py [PRESET] [--option value ...]"
    p = OneLineParser("train.py", __doc__, usage=usage, epilog="\n".join(lines))
    p.add_argument("preset", nargs="?", default="digits", choices=tuple(PRESETS), help="the default is digits")
    add_options(p.add_argument_group("the run"), Options)
    add_options(p.add_argument_group("the configuration (defaults are those of digits)"), Config)
    return p


def prepare(
    preset: str, changes: dict[str, Any], out: Path, *, resume: bool = False, world_size: int = 1
) -> tuple[Config, bool]:
    """Choose the configuration of a run, and tell whether it goes on with the one in the folder `out`.

    Args:
        preset: a key of PRESETS.
        changes: fields of the configuration in place of the preset's.
        out: folder of the run.
        resume: go on with the run in that folder, if there is one.
        world_size: number of processes.

    Raises:
        ValueError, OSError: bad values, or a folder that is in the way.
    """
    config = dataclasses.replace(PRESETS[preset], **changes)
    changes = {name: getattr(config, name) for name in changes}  # words of --settings have become values
    resumed = resume and (out / CONFIG).exists()
    if resumed:
        of_preset = {} if preset == "digits" else dataclasses.asdict(PRESETS[preset])  # digits may be unsaid
        kept = (*RESUMABLE, "steps", "init")  # as stored, where nothing else is said
        config = stored_config(out, {k: v for k, v in of_preset.items() if k not in kept} | changes)
    else:
        require_free(out, (CONFIG,), ways="--resume", overwrite=saved_nothing(out))
    if config.batch_size % (world_size * config.accumulate):
        raise UserError(
            f"--batch-size {config.batch_size} is no multiple of {world_size} processes times "
            f"--accumulate {config.accumulate}"
        )
    if config.parallel == "fsdp":
        check_version()
    return config, resumed


def described(config: Config, data: Data, folder: Path | None, vae: str | None = None) -> Provenance:
    """Describe the data, and check that they are those of the run in a folder, and of the weights that it starts from.

    Args:
        config: of the run.
        data: its data.
        folder: of a run that goes on.
        vae: --vae, if it is given; else a run that goes on keeps what it was given.

    Raises:
        ValueError: they are others.
    """
    here = provenance_of(config, data)
    before = None if folder is None else read_provenance(folder)
    if before is not None:
        before.check_same(here, f"--resume: {folder} was trained on other data than --data-path holds")
        here = dataclasses.replace(here, autoencoder=before.autoencoder)
    start = config.init if folder is None else None  # of a run that goes on, its checkpoint holds all that is needed
    source = None if start is None else read_provenance(start)
    if source is not None:
        source.check_same_latents(here, f"--init: {start} was trained on other latents than --data-path holds")
    return here if vae is None else dataclasses.replace(here, autoencoder=vae)


def load_decoder(here: Provenance, asked: bool, world: World) -> nn.Module | None:
    """Load the autoencoder of latents; None where there is none, or it cannot be had and was not asked for.

    Raises:
        ValueError: it was asked for by --vae and cannot be had, or it is not the one that made the latents.
    """
    if here.normalisation is None or here.autoencoder is None:
        if asked:
            raise UserError(f"--vae shows latents as pictures; --data {here.data} has none")
        return None
    name = here.autoencoder
    try:
        vae = world.on_first(lambda: load_vae(name)) or load_vae(name)  # the first process may have to fetch it
    except ValueError as error:
        if asked:
            raise
        if world.first:
            print(f"{error}; grids show latents as they are")
        return None
    there = Provenance(here.data, autoencoder_fingerprint=fingerprint(vae.state_dict()))
    here.check_same_latents(there, f"--vae {name} is not what made the latents")
    return vae.to(world.device)


def begin(
    preset: str, changes: dict[str, Any], options: Options, world: World, judge: Judge | None = None
) -> tuple[Run, Data]:
    """Make a run, or restore the one that goes on, and load its data.

    Args:
        preset: a key of PRESETS.
        changes: fields of the configuration in place of the preset's.
        options: how and where to run.
        world: the processes.
        judge: measures the run in place of what the options name.

    Raises:
        UserError: bad options, missing data, a folder that is in the way or cannot be resumed.
    """
    out = Path(options.out or f"runs/imagenet/{preset}")
    plan = world.on_first(lambda: prepare(preset, changes, out, resume=options.resume, world_size=world.size))
    config, resumed = world.broadcast(plan)
    if options.wandb is not None:
        check_wandb()
    if options.evaluate_every and judge is None:
        reference, inception = (None if a is None else Path(a) for a in (options.reference, options.inception))
        judge = make_judge(config, reference, inception, options.evaluate_count, world)
    data = world.on_first(lambda: load_data(config, options.data_path, download=options.download))
    if data is None:  # the first process has fetched it
        data = load_data(config, options.data_path)
    here = world.broadcast(world.on_first(lambda: described(config, data, out if resumed else None, options.vae)))
    vae = load_decoder(here, options.vae is not None, world)
    run = Run(out, Training(config, world), options.keep, here, vae=vae, judge=judge, wandb=options.wandb)
    run.start()
    world.on_first(run.create)
    if not resumed and options.resume and world.first:
        print(f"{out} holds no run to resume: beginning one")
    return run, data


def train(run: Run, data: Data, options: Options) -> bool:
    """Train to the end, or until any process is asked to stop; returns whether it came to the end. Saves either way.

    Raises:
        FloatingPointError: a loss that is NaN or infinite, with step, term and rank. The last checkpoint stays.
        OSError: a checkpoint that could not be written.
    """
    training, config, world = run.training, run.training.config, run.world
    batches = Batches(config, data, world.rank, world.size)
    first = saved = training.step  # a run that is resumed has its first step's checkpoint
    stopped = False
    bar = progress(
        total=config.steps, initial=first, unit="step", desc="training", file=sys.stdout, mininterval=0.5,
        disable=not world.first,
    )  # fmt: skip
    run.log.open()
    with contextlib.closing(run.log), Interruption() as interruption, SaveRequests() as requests, run.saver, bar:
        for batch in run.log.timed(loader(batches, first, options.workers, pin=world.device.type == "cuda")):
            stop = interruption.requested or run.saver.failed
            metrics = training.train_step(batch, stop=stop, save=requests.take())
            step = training.step
            run.log.note(metrics)
            bar.update()
            if step % options.log_every == 0:
                line = run.log.write(metrics)
                shown = (*TERMS, "images_per_second", "data_wait", "gib")
                bar.set_postfix({k: f"{line[k]:.3g}" for k in shown}, refresh=False)
            if step % options.sample_every == 0:
                run.draw_grid(f"samples/{step:08d}.png")
            if options.evaluate_every and step % options.evaluate_every == 0:
                run.evaluate([options.evaluate_steps])
            if step % options.save_every == 0 or metrics.asked_to_save:
                run.save()
                saved = step
            if metrics.asked_to_stop:
                stopped = True
                break
        if saved != training.step:
            run.save()
    return not stopped or training.step == config.steps


@contextlib.contextmanager
def hint_at_memory() -> Iterator[None]:
    """Add to a GPU's OutOfMemoryError what would need less memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        error.add_note("smaller micro-batches (--accumulate) or recomputed blocks (--checkpointing) need less memory")
        raise


def main(argv: list[str] | None = None, judge: Judge | None = None) -> int:
    """Run the command; `judge` replaces what measures the run. Returns the exit status: 0 done, 130 stopped."""
    started = time.perf_counter()
    command = parser()
    arguments = command.parse_args(argv)
    with contextlib.ExitStack() as stack:
        with command.errors(), user_files():
            options = Options(**given(arguments, Options))
            world = stack.enter_context(distributed.process_group(options.device))
            if world.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
                torch.set_num_threads(THREADS)
            run, data = begin(arguments.preset, given(arguments, Config), options, world, judge)
        with command.errors(GO_ON), hint_at_memory():
            finished = train(run, data, options)
            scores = run.write_report(time.perf_counter() - started).get("nfe", {}) if finished else {}
    if world.first and not finished:
        print(f"stopped at step {run.training.step}, and saved: {GO_ON}")
    elif world.first:
        for nfe, row in scores.items():
            print(f"{nfe} NFE: " + ", ".join(f"{name} {value:.3f}" for name, value in row.items()))
        print(f"{run.log.seconds:.0f} s of training; weights, samples and figures: {run.folder}")
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    run_command(main)
