"""Draw images from a trained model: a run's folder, or weights as .safetensors.

    python imagenet/sample.py runs/imagenet/digits --out digits.png                    a grid, one step
    python imagenet/sample.py imagenet256-w2.safetensors --out cats.png --classes tabby "tiger cat" 285 --steps 4
    python imagenet/sample.py imagenet256-w2.safetensors --out samples256 --count 50000                 a folder of PNG
    torchrun --nproc-per-node 8 imagenet/sample.py runs/imagenet/imagenet256-w2 --out samples.npz --count 50000

The ending of --out decides: .png is one grid, .npz all images as ADM's evaluation takes them, anything else a folder
with a PNG per image. A grid has a class per column: those of --classes, or at most ten, evenly spaced. Otherwise sample
i has the class number i modulo the number of classes (or of --classes). Its noise is decided by --seed and i alone, so
it is the same image for any batch size and any number of processes.

A network works for the guidance weights that it was trained with, which its file says; --w overrides that, with a
warning. Models of latents need the autoencoder that made them (--vae).
"""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from imagenet import distributed
from imagenet.data.fingerprints import fingerprint
from imagenet.data.image_files import EXTENSIONS, Pixels, grid, save_png, write_npz
from imagenet.distributed import World
from imagenet.model_options import add_model_options, load_model
from imagenet.sampler import BATCH, ROWS, Generator
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import require_free, require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

COUNT = 64  # images, where nothing else is said
CHUNK = 256  # images put together at a time
PLAN = "sampling.json"  # what a folder will hold: sampling goes on only if it is the same
ABOUT = "samples.json"  # says of a folder that it holds samples, all of them
OTHERS = EXTENSIONS - {".png"} | {".npy", ".pt", ".pdf", ".zip", ".tar", ".safetensors", ".mp4"}  # no names of folders


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("sample.py", __doc__)
    p.add_argument("source", type=Path, help="a run's folder, or weights as .safetensors")
    p.add_argument("--out", type=Path, required=True, help="GRID.png, IMAGES.npz or a folder")
    p.add_argument("--count", type=int, help=f"number of images (default: {COUNT}; of a grid {ROWS} per class)")
    p.add_argument("--steps", type=int, default=1, help="network evaluations per image")
    p.add_argument("--overwrite", action="store_true", help="replace what --out already holds")
    add_model_options(p)
    return p


# Files --------------------------------------------------------------------------------------------------------------


def prepare(out: Path, plan: dict[str, Any], *, overwrite: bool = False) -> None:
    """Refuse to write over what is there, or make way for it; a folder of the same plan, unfinished, is kept.

    Args:
        out: --out.
        plan: what decides the images.
        overwrite: replace other images.

    Raises:
        ValueError: something is there, or `out` ends as files do that are not written here.
    """
    if is_folder(out):
        unfinished = (out / PLAN).is_file() and not (out / ABOUT).is_file()
        if unfinished and not overwrite:
            _check_plan(out, plan)
            return
        require_free(out, (PLAN if unfinished else ABOUT,), "samples", "--overwrite", overwrite)
        if out.exists():
            shutil.rmtree(out)
    elif out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} exists already: {'' if out.is_dir() else '--overwrite, or '}another --out")
    elif not out.exists():
        require_new(out)  # sees whether it can be written
    (out if is_folder(out) else out.parent).mkdir(parents=True, exist_ok=True)
    if is_folder(out):
        write_atomically(out / PLAN, json.dumps(plan, indent=2) + "\n")


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Raise ValueError unless the unfinished samples in a folder are those of a plan."""
    try:
        before = json.loads((out / PLAN).read_text())
        changed = [key for key in plan if before[key] != plan[key]]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{out / PLAN} is damaged: --overwrite, or another --out") from None
    if changed:
        raise UserError(f"{out} holds unfinished samples of other {', '.join(changed)}: --overwrite, or another --out")


def plan_of(generator: Generator, count: int, steps: int) -> dict[str, Any]:
    """Describe everything that decides the images of a folder."""
    networks = {"weights": generator.flow_map, "autoencoder": generator.vae}
    return {
        "count": count,
        "steps": steps,
        "w": generator.guidance,
        "seed": generator.seed,
        "classes": generator.labels(range(min(count, generator.config.classes))),
        **{name: None if net is None else fingerprint(net.state_dict()) for name, net in networks.items()},
    }


def is_folder(out: Path) -> bool:
    """Tell whether --out names a folder of images.

    Raises:
        ValueError: it ends as files do that are not written here.
    """
    if out.suffix.lower() in OTHERS and not out.is_dir():
        raise UserError(f"--out must end in .png or .npz, or be a folder; {out.suffix} is not written")
    return out.suffix not in (".png", ".npz")


def missing(out: Path, numbers: range) -> list[int]:
    """Return the numbers of images that a folder does not hold yet."""
    return [i for i in numbers if not image_of(out, i).exists()]


def image_of(out: Path, number: int) -> Path:
    """Return the file of an image in a folder."""
    return out / f"{number:06d}.png"


def part_of(out: Path, rank: int) -> Path:
    """Return the file where a process keeps its images until the first puts them together."""
    return out.with_name(f"{out.name}.part{rank:04d}.npy")


def write_images(out: Path, batches: Iterator[Pixels], numbers: list[int], bar: Any) -> None:
    """Write the images of some numbers into a folder, each complete or not at all."""
    done = 0
    with ThreadPoolExecutor() as pool:
        for pixels in batches:
            names = (image_of(out, i) for i in numbers[done : done + len(pixels)])
            list(pool.map(save_png, names, pixels))
            done += len(pixels)
            bar.update(len(pixels))


def write_part(out: Path, batches: Iterator[Pixels], world: World, numbers: range, bar: Any) -> None:
    """Write this process's images as its part of the file."""
    part, done = None, 0
    for pixels in batches:
        if part is None:
            shape = (len(numbers), *pixels.shape[1:])
            part = np.lib.format.open_memmap(part_of(out, world.rank), "w+", np.uint8, shape)
        part[done : done + len(pixels)] = pixels
        done += len(pixels)
        bar.update(len(pixels))
    if part is not None:
        part.flush()


def join_parts(out: Path, world: World, labels: list[int], columns: int) -> None:
    """Make the .npz or the grid of the parts of all processes, in order, and remove the parts."""
    ranks = (rank for rank in range(world.size) if replace(world, rank=rank).partition(len(labels)))
    parts = [np.load(part_of(out, rank), mmap_mode="r") for rank in ranks]
    if out.suffix == ".npz":
        batches = (part[i : i + CHUNK] for part in parts for i in range(0, len(part), CHUNK))
        write_npz(out, len(labels), batches, np.array(labels, np.int64))
    else:
        save_png(out, grid(np.concatenate(parts), columns))
    for path in out.parent.glob(f"{out.name}.part*.npy"):
        path.unlink()


# The command --------------------------------------------------------------------------------------------------------


def draw(
    generator: Generator, out: Path, world: World, *, count: int = COUNT, steps: int = 1, batch_size: int = BATCH
) -> float:
    """Write samples 0 to count - 1 of a model to `out`; returns the seconds that it took. All processes take part.

    Args:
        generator: the model.
        out: where to, see above.
        world: the processes.
        count: number of images.
        steps: network evaluations per image.
        batch_size: images at a time, per process.

    Raises:
        OSError: a file could not be written.
    """
    numbers, started = world.partition(count), time.perf_counter()
    todo = missing(out, numbers) if is_folder(out) else numbers
    done = len(numbers) - len(todo)
    with progress(total=len(numbers), initial=done, unit="image", desc="sampling", disable=not world.first) as bar:
        batches = generator.batches(todo, steps, batch_size)
        if is_folder(out):
            write_images(out, batches, list(todo), bar)
        else:
            write_part(out, batches, world, numbers, bar)
    world.barrier()
    seconds, labels = time.perf_counter() - started, generator.labels(range(count))
    if world.first and is_folder(out):
        for leftover in out.glob("*.partial"):  # of a process that was killed while it wrote
            leftover.unlink()
        about = {"steps": steps, "w": generator.guidance, "seed": generator.seed, "labels": labels}
        write_atomically(out / ABOUT, json.dumps(about) + "\n")
    elif world.first:
        join_parts(out, world, labels, generator.columns(count))
    return seconds


def main(argv: list[str] | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `vae` replaces the autoencoder that the options name. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors(), user_files():
        hint = "the same command goes on" if is_folder(options.out) else ""
    with command.errors(hint), distributed.process_group(options.device) as world:
        count: int = COUNT if options.count is None else options.count
        require_at_least(1, count=count, steps=options.steps, batch_size=options.batch_size)
        generator = load_model(options, world, vae)
        if options.out.suffix == ".png":
            generator = generator.with_columns()
            count = ROWS * len(generator.classes or ()) if options.count is None else count
        plan = plan_of(generator, count, options.steps) if is_folder(options.out) else {}
        with user_files():
            world.on_first(lambda: prepare(options.out, plan, overwrite=options.overwrite))
        seconds = draw(generator, options.out, world, count=count, steps=options.steps, batch_size=options.batch_size)
        if world.first:
            w, rate = f"w = {generator.guidance:g}", f"{count / seconds:.3g} images per second"
            print(f"{options.out}: {count} images, {options.steps} step{'s' * (options.steps > 1)} each, {w}, {rate}")
    return 0


if __name__ == "__main__":
    run(main)
