"""Encode a folder of images into latents, which train.py reads.

    python imagenet/encode.py ILSVRC2012/train --out latents256
    python imagenet/encode.py ILSVRC2012/train --out latents512 --image-size 512
    torchrun --nproc-per-node 8 imagenet/encode.py ILSVRC2012/train --out latents256    one process per GPU
    python imagenet/encode.py pictures --out latents --vae folder/of/an/autoencoder     no network needed

SOURCE has one folder per class, with images inside (at any depth); classes are numbered in order of their names. Images
are centre-cropped and resized as in ADM: halved by averaging while both sides are at least twice the target, then
scaled bicubically until the shorter side fits, then cut. For each image the mean and standard deviation of its
posterior are stored as float16: 21 GB for ImageNet at 256, 84 GB at 512.

An encoding that was stopped goes on with the same command, on any number of processes, and ends in the same files.
Images that cannot be decoded are left out, counted, and listed with their reasons in skipped.txt.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from imagenet import distributed
from imagenet.data.fingerprints import fingerprint
from imagenet.data.image_files import Pixels, is_image
from imagenet.data.latents import FORMAT, INDEX, index_of, measured_normalisation, moments, write_shard
from imagenet.data.vae import NORMALISATION, VAE, encode, load_vae
from imagenet.distributed import World
from tvm_ref.cli.errors import UserError
from tvm_ref.cli.files import require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, option, require_at_least, run
from tvm_ref.cli.progress import progress

PLAN = "encode.json"  # what is being encoded, and how: an encoding goes on only if it is the same
SKIPPED = "skipped.txt"


class Entry(NamedTuple):
    """An image of the source: its path below it, and its class."""

    path: str
    label: int


@dataclass(frozen=True)
class Settings:
    """How images are encoded.

    Raises:
        ValueError: a bad value, named by its option.
    """

    image_size: int = option(256, "side of the square that is cut out")
    vae: str = option(VAE, "an AutoencoderKL, by folder or by name on the hub")
    normalisation: Literal["auto", "paper", "measured"] = option(
        "auto", "of latents: the paper's constants, or as measured; auto: the paper's for its autoencoder, by name"
    )
    batch_size: int = option(64, "images per call of the autoencoder")
    shard_size: int = option(8192, "images per file")
    workers: int = option(8, "threads that read images, per process")

    def __post_init__(self) -> None:
        names = ("image_size", "batch_size", "shard_size", "workers")
        require_at_least(1, **{name: getattr(self, name) for name in names})
        if self.normalisation == "paper" and self.image_size not in NORMALISATION:
            sizes = " and ".join(map(str, NORMALISATION))
            raise UserError(f"--normalisation paper is known for --image-size {sizes}, not {self.image_size}")

    @property
    def is_paper_s(self) -> bool:
        """Whether latents are normalised by the paper's constants, which are those of one autoencoder."""
        known = self.image_size in NORMALISATION and self.vae == VAE
        return self.normalisation == "paper" or (self.normalisation == "auto" and known)


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("encode.py", __doc__)
    p.add_argument("source", type=Path, help="folder with one folder of images per class")
    p.add_argument("--out", type=Path, required=True, help="folder for the latents")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU per process where there is one)")
    add_options(p, Settings)
    return p


# Images -------------------------------------------------------------------------------------------------------------


def find_images(source: Path) -> tuple[list[str], list[Entry]]:
    """Find the classes and images of a folder, both in order of their names.

    Raises:
        ValueError: no class folders, or one without images.
    """
    if not source.is_dir():
        raise UserError(f"{source} is not a folder")
    classes = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise UserError(f"{source} holds no folders; one folder of images per class is expected")
    entries: list[Entry] = []
    for label, name in enumerate(classes):
        found = [
            os.path.relpath(os.path.join(folder, file), source)
            for folder, _, files in os.walk(source / name, followlinks=True)
            for file in files
            if is_image(Path(file))
        ]
        if not found:
            raise UserError(f"{source / name} holds no images")
        entries += [Entry(path, label) for path in sorted(found)]
    return classes, entries


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """Cut the middle out of an image, resized as in ADM: uint8 [size, size, 3]."""
    image = image.convert("RGB")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def load(path: Path, size: int) -> Pixels | str:
    """Read an image and crop it, or return the reason why it cannot be decoded.

    Raises:
        OSError: the file cannot be read at all: that is no fault of the image.
    """
    data = path.read_bytes()
    try:
        with Image.open(BytesIO(data)) as image:
            return centre_crop(image, size)
    except Exception as error:  # a damaged file can break a decoder anywhere; the reason is recorded
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return re.sub(r"\s*<[^>]* at 0x[0-9a-f]+>", "", reason)  # an address would differ from run to run


def load_ahead(paths: Sequence[Path], size: int, batch_size: int, workers: int) -> Iterator[list[Pixels | str]]:
    """Load images, a batch at a time; the next batch is read while the caller works on this one."""
    with ThreadPoolExecutor(workers) as pool:
        under_way: list[Future[Pixels | str]] = []
        for start in range(0, len(paths) + batch_size, batch_size):
            following = [pool.submit(load, path, size) for path in paths[start : start + batch_size]]
            if under_way:
                yield [result.result() for result in under_way]
            under_way = following


# Shards -------------------------------------------------------------------------------------------------------------


def encode_shard(
    source: Path, out: Path, name: str, entries: Sequence[Entry], vae: nn.Module, settings: Settings, bar: Any
) -> None:
    """Write one shard, and NAME.json last, the sign that the shard is complete.

    Args:
        source: folder of the images.
        out: folder of the latents.
        name: of the shard.
        entries: the images of the shard.
        vae: the autoencoder.
        settings: sizes.
        bar: a progress bar.

    Raises:
        FloatingPointError: latents that are not finite.
    """
    device = next(vae.parameters()).device
    posteriors, labels, skipped = [], [], []
    paths = [source / entry.path for entry in entries]
    batches = load_ahead(paths, settings.image_size, settings.batch_size, settings.workers)
    for i, results in enumerate(batches):
        batch = entries[i * settings.batch_size :][: len(results)]
        skipped += [[e.path, reason] for e, reason in zip(batch, results, strict=True) if isinstance(reason, str)]
        good = [(e, image) for e, image in zip(batch, results, strict=True) if not isinstance(image, str)]
        if good:
            images = torch.from_numpy(np.stack([image for _, image in good])).permute(0, 3, 1, 2)
            posterior = encode(vae, images.to(device)).half().cpu().numpy()
            if not np.isfinite(posterior).all():
                raise FloatingPointError(f"latents that are not finite among {good[0][0].path} to {good[-1][0].path}")
            posteriors.append(posterior)
            labels += [e.label for e, _ in good]
        bar.update(len(results))
    if labels:
        stored = np.concatenate(posteriors)
        write_shard(out, name, stored, np.array(labels, np.int64))
    report = {"name": name, "count": len(labels), "skipped": skipped, "moments": moments(stored) if labels else None}
    write_atomically(out / f"{name}.json", json.dumps(report) + "\n")


# The command --------------------------------------------------------------------------------------------------------


def plan_of(settings: Settings, classes: list[str], entries: list[Entry], vae: nn.Module) -> dict[str, Any]:
    """Describe everything that decides the outcome of an encoding."""
    listing = hashlib.sha256("\n".join(f"{e.label} {e.path}" for e in entries).encode()).hexdigest()
    decisive = {name: value for name, value in asdict(settings).items() if name != "workers"}
    about = {"format": FORMAT, "images": len(entries), "classes": len(classes), "listing": listing}
    return about | decisive | {"vae_fingerprint": fingerprint(vae.state_dict())}


def prepare(out: Path, plan: dict[str, Any]) -> None:
    """Make the folder, or see that what it holds is the same encoding, unfinished.

    Raises:
        ValueError: anything else is in the way.
    """
    if (out / INDEX).exists():
        raise UserError(f"{out} already holds finished latents; choose another --out")
    if (out / PLAN).exists():
        try:
            before = json.loads((out / PLAN).read_text())
        except ValueError:
            raise UserError(f"{out / PLAN} is damaged; choose another --out") from None
        for key, value in plan.items():
            if before.get(key) != value:
                raise UserError(
                    f"{out} holds an encoding of other {key} ({before.get(key)}, not {value}); choose another --out"
                )
        return
    require_free(out, (PLAN,), "latents")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / PLAN, json.dumps(plan, indent=2) + "\n")


def finish(out: Path, names: list[str], classes: list[str], plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Write skipped.txt and latents.json, the sign that all is done; returns what latents.json holds.

    Raises:
        ValueError: not one image could be decoded.
    """
    reports = [json.loads((out / f"{name}.json").read_text()) for name in names]
    skipped = [line for report in reports for line in report["skipped"]]
    write_atomically(out / SKIPPED, "".join(f"{path}\t{reason}\n" for path, reason in skipped))
    count = sum(report["count"] for report in reports)
    if not count:
        raise UserError(f"not one of {len(skipped)} images could be decoded; {out / SKIPPED} says why")
    measured = measured_normalisation(reports)
    index = index_of(
        plan["image_size"],
        classes,
        NORMALISATION[settings.image_size] if settings.is_paper_s else measured,
        [{"name": report["name"], "count": report["count"]} for report in reports],
        count=count,
        skipped=len(skipped),
        vae=plan["vae"],
        vae_fingerprint=plan["vae_fingerprint"],
        measured={"mean": measured.mean, "std": measured.std},
    )
    for leftover in out.glob("*.partial"):  # of a process that was killed while it wrote
        leftover.unlink()
    write_atomically(out / INDEX, json.dumps(index, indent=2) + "\n")
    return index


def encode_folder(
    source: Path, out: Path, settings: Settings, *, world: World | None = None, vae: nn.Module | None = None
) -> dict[str, Any] | None:
    """Encode a folder of images into a folder of latents, or go on with it. All processes take part.

    Args:
        source: folder with one folder of images per class.
        out: folder for the latents.
        settings: how.
        world: the processes; None is this one alone, on the CPU.
        vae: an autoencoder in place of the one that the settings name.

    Returns:
        what latents.json holds, in the first process.

    Raises:
        ValueError, OSError: bad input.
        FloatingPointError: see encode_shard.
    """
    world = world or World()
    if out.resolve().is_relative_to(source.resolve()):
        raise UserError(f"--out {out} lies inside {source}, where it would count as a class")
    classes, entries = find_images(source)
    vae = (load_vae(settings.vae) if vae is None else vae).to(world.device)  # first: a failure leaves no folder behind
    plan = plan_of(settings, classes, entries, vae)
    world.on_first(lambda: prepare(out, plan))
    starts = range(0, len(entries), settings.shard_size)
    shards = {f"{i:05d}": entries[start : start + settings.shard_size] for i, start in enumerate(starts)}
    todo = world.broadcast([name for name in shards if not (out / f"{name}.json").exists()])
    mine = [todo[i] for i in world.partition(len(todo))]
    total = sum(len(shards[name]) for name in mine)
    with progress(total=total, unit="image", desc="encoding", disable=not world.first) as bar:
        for name in mine:
            encode_shard(source, out, name, shards[name], vae, settings, bar)
    world.barrier()
    return finish(out, list(shards), classes, plan, settings) if world.first else None


def main(argv: list[str] | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `vae` replaces the autoencoder that the options name. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors("the same command goes on"):
        settings = Settings(**given(options, Settings))
        with distributed.process_group(options.device) as world:
            index = encode_folder(options.source, options.out, settings, world=world, vae=vae)
    if index is not None:
        print(f"{index['count']} latents of {len(index['classes'])} classes: {options.out}")
        print(f"normalised by {'the constants of the paper' if settings.is_paper_s else 'what was measured'}")
        if index["skipped"]:
            print(f"{index['skipped']} images could not be decoded and were skipped: {options.out / SKIPPED}")
    return 0


if __name__ == "__main__":
    run(main)
