"""Draw images from a trained model: a run's folder, or weights as .safetensors.

    python imagenet/sample.py runs/imagenet/digits --out digits.png                    a grid, one step
    python imagenet/sample.py imagenet256-w2.safetensors --out cats.png --classes 281 282 285 --count 9 --steps 4
    python imagenet/sample.py imagenet256-w2.safetensors --out samples256 --count 50000                 a folder of PNG
    torchrun --nproc-per-node 8 imagenet/sample.py runs/imagenet/imagenet256-w2 --out samples.npz --count 50000

The ending of --out decides: .png is one grid, .npz all images as ADM's evaluation takes them, anything else a folder
with a PNG per image. Sample i has the class number i modulo the number of classes (or of --classes) and noise decided
by --seed and i alone, so it is the same image for any batch size and any number of processes.

A network works for the guidance weights that it was trained with, which its file says; --w overrides that, with a
warning. Models of latents need the autoencoder that made them (--vae).
"""

import argparse
import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from imagenet import parallel
from imagenet.checkpoints import load_weights
from imagenet.image_files import Pixels, save_png, write_npz
from imagenet.latents import NORMALISATION, VAE, Normalisation, decode, load_vae, read_normalisation
from imagenet.noise import PRIOR, normal
from imagenet.parallel import World, on_first
from imagenet.pictures import grid, to_pixels
from imagenet.presets import Config
from tvm_ref import Condition, FlowMap, sample
from tvm_ref.command_line import OneLineParser, require_at_least, write_atomically
from tvm_ref.sampling import Jump, stepper

CHUNK = 256  # images put together at a time
LATENT_SIDE = 8  # pixels of the image per number of the latent


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = OneLineParser(
        "sample.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    p.add_argument("source", type=Path, help="a run's folder, or weights as .safetensors")
    p.add_argument("--out", type=Path, required=True, help="GRID.png, IMAGES.npz or a folder")
    p.add_argument("--count", type=int, default=64, help="number of images (default: 64)")
    p.add_argument("--steps", type=int, default=1, help="network evaluations per image (default: 1)")
    p.add_argument("--overwrite", action="store_true", help="replace what --out already holds")
    add_model_options(p)
    return p


def add_model_options(p: argparse._ActionsContainer) -> None:
    """The options that decide how a model draws images, for every command that lets it."""
    p.add_argument("--classes", type=int, nargs="+", help="classes, in turn (default: all)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default: 0)")
    p.add_argument("--w", type=float, help="guidance weight in place of the one that the model was trained with")
    p.add_argument("--batch-size", type=int, default=64, help="images at a time, per process (default: 64)")
    p.add_argument("--vae", default=VAE, help=f"the autoencoder of latents, by folder or name (default: {VAE})")
    p.add_argument(
        "--latents", type=Path, help="folder of latents trained on, for its normalisation (default: ImageNet's)"
    )
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU per process where there is one)")


@dataclass(frozen=True)
class Generator:
    """A model as a function from the numbers of samples to images.

    Attributes:
        flow_map: the model, without gradients, on the device.
        config: what it was trained as.
        device: where it runs.
        classes: sample i has class classes[i % len(classes)].
        w: guidance weight.
        seed: of the noise.
        vae: of latents; None for models of pixels.
        normalisation: of latents.
    """

    flow_map: FlowMap
    config: Config
    device: torch.device
    classes: Sequence[int]
    w: float
    seed: int = 0
    vae: nn.Module | None = None
    normalisation: Normalisation | None = None

    @torch.no_grad()
    def samples(self, numbers: Sequence[int], steps: int) -> Tensor:
        """Samples [B, C, H, W] of the model: latents or images in [-1, 1]."""
        config = self.config
        shape = (config.in_channels, config.input_size, config.input_size)
        x1 = torch.stack([normal(shape, PRIOR, self.seed, i) for i in numbers]).to(self.device)
        label = torch.tensor(self.labels(numbers), device=self.device)
        condition = Condition(label, torch.full((len(x1),), 1 / self.w, device=self.device))
        half = config.precision == "bfloat16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16) if half else contextlib.nullcontext():
            return sample(self.jump, x1, steps, condition).float()

    @property
    def jump(self) -> Jump:
        """How the model takes a step: a jump, or, as flow matching learns none, Euler's."""
        return stepper(self.flow_map, self.config.objective)

    def images(self, numbers: Sequence[int], steps: int) -> Pixels:
        """Images [B, H, W, 3]."""
        x = self.samples(numbers, steps)
        if self.vae is not None and self.normalisation is not None:
            x = decode(self.vae, x, self.normalisation)
        return to_pixels(x)

    def batches(self, numbers: Sequence[int], steps: int, size: int) -> Iterator[Pixels]:
        """Images of many samples, `size` at a time."""
        for start in range(0, len(numbers), size):
            yield self.images(numbers[start : start + size], steps)

    def labels(self, numbers: Sequence[int]) -> list[int]:
        """The classes [B] of samples."""
        return [self.classes[i % len(self.classes)] for i in numbers]


def load_generator(source: Path, options: argparse.Namespace, world: World, vae: nn.Module | None = None) -> Generator:
    """The model of a run or of weights, with the options of add_model_options; `vae` replaces the one they name.

    Raises:
        ValueError: no weights there, or options that do not go with them.
    """
    require_at_least(1, batch_size=options.batch_size)
    require_at_least(0, seed=options.seed)
    device = world.device
    flow_map, config = load_weights(source, attention=None if device.type == "cuda" else "plain")
    classes = options.classes or list(range(config.classes))
    if not all(0 <= label < config.classes for label in classes):
        raise ValueError(f"--classes must lie in 0 to {config.classes - 1}, got {' '.join(map(str, classes))}")
    w = config.w if options.w is None else options.w
    if not 0 < w < float("inf"):
        raise ValueError(f"--w must be positive and finite, got {w}")
    if not config.w <= w <= (config.w_max or config.w) and world.first:
        trained = f"{config.w:g}" if config.w_max is None else f"{config.w:g} to {config.w_max:g}"
        print(
            f"warning: this model was trained with w = {trained}; with w = {w:g} it does not work well", file=sys.stderr
        )
    normalisation = None
    if config.data in ("latents", "synthetic"):
        vae = (load_vae(options.vae) if vae is None else vae).to(device)
        normalisation = normalisation_of(config, options.latents)
    else:
        vae = None
    return Generator(flow_map.to(device), config, device, classes, w, options.seed, vae, normalisation)


def normalisation_of(config: Config, latents: Path | None) -> Normalisation:
    """How a model's latents were normalised.

    Raises:
        ValueError: it is not known for latents of this size, and no folder of latents says it.
    """
    if latents is not None:
        return read_normalisation(latents)
    size = LATENT_SIDE * config.input_size
    if size not in NORMALISATION:
        raise ValueError(f"the normalisation of latents of {size} x {size} images is not known: say --latents FOLDER")
    return NORMALISATION[size]


# Files --------------------------------------------------------------------------------------------------------------


def prepare(out: Path, overwrite: bool) -> None:
    """Refuse to write over what is there, or make way for it.

    Raises:
        ValueError: something is there.
    """
    if out.is_dir() and any(out.iterdir()):
        ours = (out / "samples.json").is_file()
        if not (overwrite and ours):
            raise ValueError(
                f"{out} is not empty" + ("; --overwrite replaces it" if ours else "; choose another --out")
            )
        shutil.rmtree(out)
    elif out.is_file() and not overwrite:
        raise ValueError(f"{out} exists; --overwrite replaces it")
    elif out.is_dir() and out.suffix in (".png", ".npz"):
        raise ValueError(f"{out} is a folder; choose another --out")
    (out if is_folder(out) else out.parent).mkdir(parents=True, exist_ok=True)


def is_folder(out: Path) -> bool:
    """Whether --out names a folder of images."""
    return out.suffix not in (".png", ".npz")


def part_of(out: Path, rank: int) -> Path:
    """Where a process keeps its images until the first puts them together."""
    return out.with_name(f"{out.name}.part{rank:04d}.npy")


def write_share(out: Path, batches: Iterator[Pixels], world: World, share: range, bar: Any) -> None:
    """Write this process's images: as PNG if --out is a folder, else as a part of the whole."""
    part, done = None, 0
    for pixels in batches:
        if is_folder(out):
            names = (out / f"{i:06d}.png" for i in range(share.start + done, share.stop))
            with ThreadPoolExecutor() as pool:
                list(pool.map(save_png, names, pixels))
        else:
            if part is None:
                shape = (len(share), *pixels.shape[1:])
                part = np.lib.format.open_memmap(part_of(out, world.rank), "w+", np.uint8, shape)
            part[done : done + len(pixels)] = pixels
        done += len(pixels)
        bar.update(len(pixels))
    if part is not None:
        part.flush()


def put_together(out: Path, world: World, labels: list[int]) -> None:
    """Make the .npz or the grid of the parts of all processes, in order, and remove the parts."""
    ranks = (rank for rank in range(world.size) if replace(world, rank=rank).share(len(labels)))
    parts = [np.load(part_of(out, rank), mmap_mode="r") for rank in ranks]
    if out.suffix == ".npz":
        batches = (part[i : i + CHUNK] for part in parts for i in range(0, len(part), CHUNK))
        write_npz(out, len(labels), batches, np.array(labels, np.int64))
    else:
        save_png(out, grid(np.concatenate(parts), math.ceil(math.sqrt(len(labels)))))
    for path in out.parent.glob(f"{out.name}.part*.npy"):
        path.unlink()


# The command --------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, world: World, vae: nn.Module | None = None) -> str | None:
    """Draw images; `vae` replaces the one that the options name. Returns what there is to say, in the first process.

    Raises:
        ValueError, OSError: bad input.
    """
    require_at_least(1, count=options.count, steps=options.steps)
    generator = load_generator(options.source, options, world, vae)
    on_first(world, lambda: prepare(options.out, options.overwrite))
    share, started = world.share(options.count), time.perf_counter()
    with tqdm(total=len(share), unit="image", desc="sampling", disable=not world.first) as bar:
        batches = generator.batches(share, options.steps, options.batch_size)
        write_share(options.out, batches, world, share, bar)
    world.wait()
    if not world.first:
        return None
    seconds = time.perf_counter() - started
    labels = generator.labels(range(options.count))
    if is_folder(options.out):
        about = {"source": options.source.name, "steps": options.steps, "w": generator.w, "seed": options.seed}
        write_atomically(options.out / "samples.json", json.dumps(about | {"labels": labels}) + "\n")
    else:
        put_together(options.out, world, labels)
    rate = f"{options.count / seconds:.3g} images per second"
    return f"{options.out}: {options.count} images, {options.steps} steps each, w = {generator.w:g}, {rate}"


def main(argv: list[str] | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; returns the exit status: 0 done, 2 bad input."""
    options = parser().parse_args(argv)
    try:
        said = run(options, parallel.start(options.device), vae)
    except (ValueError, OSError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sample.py: stopped", file=sys.stderr)
        return 130
    finally:
        parallel.stop()
    if said is not None:
        print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
