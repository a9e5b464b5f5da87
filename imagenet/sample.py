"""Draw images from a trained model: a run's folder, weights as .safetensors, or the name of a model that comes along.

    python imagenet/sample.py digits --out digits.png                          nothing to train: pretrained/README.md
    python imagenet/sample.py runs/imagenet/digits --out digits.png                    a grid, one step
    python imagenet/sample.py imagenet256-w2.safetensors --out cats.png --classes 281 282 285 --steps 4
    python imagenet/sample.py runs/imagenet/folder --out pictures.png --classes "red things"     classes by folder name
    python imagenet/sample.py imagenet256-w2.safetensors --out samples256 --count 50000                 a folder of PNG
    torchrun --nproc-per-node 8 imagenet/sample.py runs/imagenet/imagenet256-w2 --out samples.npz --count 50000

The ending of --out decides: .png is one grid, .npz all images as ADM's evaluation takes them, anything else a folder
with a PNG per image. A grid has a class per column: those of --classes, or at most ten, evenly spaced. Otherwise sample
i has the class number i modulo the number of classes (or of --classes). Its noise is decided by --seed and i only, so
it is the same image for any batch size and any number of processes.

A network works for the guidance weights that it was trained with, which its file says; --w overrides that, with a
warning. Models of latents need the autoencoder that made them (--vae).
"""

import itertools
import json
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from torch import nn

from imagenet.data.image_files import EXTENSIONS, ImageFiles, grid, save_png, write_npz
from imagenet.model import distributed
from imagenet.sampler import ROWS, Generator, add_model_options, load_model
from tvm_ref.cli.errors import UserError, require, user_files
from tvm_ref.cli.files import require_free, require_new, write_atomically
from tvm_ref.cli.options import OneLineParser, require_at_least, run
from tvm_ref.cli.progress import progress

COUNT = 64  # default number of images
CHUNK = 256  # images put together at a time
MOST = 10**6  # number of images at most: their names have six digits
ABOUT = "samples.json"  # marks a complete folder of samples


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("sample.py", __doc__)
    p.add_argument("source", type=Path, help="a run's folder, weights as .safetensors, or a name, as digits")
    p.add_argument("--out", type=Path, required=True, help="file or folder to write: GRID.png, IMAGES.npz or a folder")
    p.add_argument("--count", type=int, help=f"number of images (default: {COUNT}; for a grid {ROWS} per class)")
    p.add_argument("--steps", type=int, default=1, help="network evaluations per image")
    add_model_options(p)
    return p


@user_files()
def prepare(out: Path) -> Path:
    """Make the folder that images are drawn into: --out, or one next to it until its file is put together.

    Raises:
        UserError: something else is there, or --out ends as files do that are not written here.
    """
    if out.suffix in (".png", ".npz"):
        require_new(out)
        return Path(tempfile.mkdtemp(dir=out.parent, prefix=f"{out.name}."))
    if out.suffix.lower() in EXTENSIONS and not out.is_dir():
        raise UserError(f"--out must end in .png or .npz, or be a folder; {out.suffix} is not written")
    require_free(out, (ABOUT,), "samples")
    out.mkdir(parents=True, exist_ok=True)
    return out


def draw(generator: Generator, folder: Path, numbers: range, steps: int, batch_size: int, *, quiet: bool) -> None:
    """Write the images of some numbers as NUMBER.png."""
    files = (folder / f"{i:06d}.png" for i in numbers)
    with (
        ThreadPoolExecutor() as pool,
        progress(total=len(numbers), unit="image", desc="sampling", disable=quiet) as bar,
    ):
        for pixels in generator.batches(numbers, steps, batch_size):
            list(pool.map(save_png, itertools.islice(files, len(pixels)), pixels))
            bar.update(len(pixels))


def finish(generator: Generator, out: Path, folder: Path, count: int, steps: int) -> None:
    """Mark the folder --out as complete, or make the file --out from the images in a folder."""
    labels = generator.labels(range(count))
    if folder == out:
        about = {"steps": steps, "w": generator.guidance, "seed": generator.seed, "labels": labels}
        write_atomically(out / ABOUT, json.dumps(about) + "\n")
        return
    batches = (batch.permute(0, 2, 3, 1).numpy() for batch in ImageFiles(folder).batches(CHUNK))
    if out.suffix == ".npz":
        write_npz(out, count, batches, np.array(labels, np.int64))
    else:
        save_png(out, grid(np.concatenate(list(batches)), generator.columns(count)))


def main(argv: list[str] | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `vae` replaces the autoencoder that the options name. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    out, steps = options.out, options.steps
    with command.errors(), distributed.process_group(options.device) as world:
        count: int = COUNT if options.count is None else options.count
        require_at_least(1, count=count, steps=steps, batch_size=options.batch_size)
        require(count <= MOST, f"--count must be at most {MOST}, got {count}")
        generator = load_model(options, world, vae)
        if out.suffix == ".png":  # a grid, with a class per column
            count = generator.grid_count() if options.count is None else count
            generator = generator.with_columns()
        folder: Path = world.broadcast(world.on_first(lambda: prepare(out)))
        try:
            started = time.perf_counter()
            draw(generator, folder, world.partition(count), steps, options.batch_size, quiet=not world.first)
            world.barrier()
            seconds = time.perf_counter() - started
            if world.first:
                finish(generator, out, folder, count, steps)
        finally:
            if world.first and folder != out:
                shutil.rmtree(folder)
        if world.first:
            w, rate = f"w = {generator.guidance:g}", f"{count / seconds:.3g} images per second"
            print(f"{out}: {count} images, {steps} step{'s' * (steps > 1)} each, {w}, {rate}")
            if out.suffix == ".png" and generator.config.classes > 1:
                columns = generator.labels(range(generator.columns(count)))
                print("columns: " + ", ".join(generator.names[k] if generator.names else str(k) for k in columns))
    return 0


if __name__ == "__main__":
    run(main)
