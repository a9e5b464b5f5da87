"""Encode a folder of images into latents, which train.py reads.

    python imagenet/encode.py ILSVRC2012/train --out latents256
    python imagenet/encode.py ILSVRC2012/train --out latents512 --image-size 512
    torchrun --nproc-per-node 8 imagenet/encode.py ILSVRC2012/train --out latents256    one process per GPU
    python imagenet/encode.py pictures --out latents --vae folder/of/an/autoencoder     no network needed

SOURCE has one folder per class, with images inside (at any depth); classes are numbered in order of their names. A
folder without such folders is one class. Images are centre-cropped and resized as in ADM: halved by averaging while
both sides are at least twice the target, then scaled bicubically until the shorter side fits, then cut. For each image
the mean and standard deviation of its posterior are stored as float16: 21 GB for ImageNet at 256, 84 GB at 512.

An encoding that was stopped continues with the same command, on any number of processes, and ends in the same files.
Images that cannot be read are left out and counted; each is printed with the reason.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from imagenet.data.latents import FORMAT, INDEX, measured_normalisation, moments, write_shard
from imagenet.data.pictures import Entry, list_images, load_ahead, summary
from imagenet.data.vae import NORMALISATION, VAE, encode, load_vae
from imagenet.model import distributed
from imagenet.model.distributed import World
from tvm_ref.cli.errors import require, user_files
from tvm_ref.cli.files import read_json, require_free, write_atomically
from tvm_ref.cli.options import OneLineParser, add_options, given, option, require_at_least, run
from tvm_ref.cli.progress import progress

LISTING = "images.txt"  # class and path of each image, listed at the start
PLAN = "encode.json"  # settings of the encoding; written after the listing


@dataclass(frozen=True)
class Settings:
    """Settings of the encoding of images.

    Raises:
        UserError: a bad value, named by its option.
    """

    image_size: int = option(256, "side of the square to crop, in pixels")
    vae: str = option(VAE, "folder of an AutoencoderKL, or its name on the Hugging Face hub")
    batch_size: int = option(64, "number of images per call of the autoencoder")
    shard_size: int = option(8192, "number of images per file")
    workers: int = option(8, "threads that read images, per process")

    def __post_init__(self) -> None:
        names = ("image_size", "batch_size", "shard_size", "workers")
        require_at_least(1, **{name: getattr(self, name) for name in names})

    @property
    def is_paper_s(self) -> bool:
        """True if latents are normalised by the paper's constants, which belong to one autoencoder, by name."""
        return self.image_size in NORMALISATION and Path(self.vae).name == Path(VAE).name


def parser() -> OneLineParser:
    """Build the command line."""
    p = OneLineParser("encode.py", __doc__)
    p.add_argument("source", type=Path, help="folder with one folder of images per class")
    p.add_argument("--out", type=Path, required=True, help="folder to write the latents into")
    p.add_argument("--device", help="cpu, cuda, ... (default: a GPU per process where there is one)")
    add_options(p, Settings)
    return p


def prepare(source: Path, out: Path, plan: dict[str, Any]) -> None:
    """Make the folder of an encoding, or check that it holds the same encoding.

    The images are listed once: those that vanish before they are read are skipped, and finished shards are kept.

    Raises:
        UserError: anything else is in the way.
    """
    if (out / PLAN).exists():
        before = read_json(out / PLAN, "encoding", tuple(plan))
        for key, value in plan.items():
            other = f"an encoding of other {key} ({before[key]}, not {value})"
            require(before[key] == value, f"{out} holds {other}; choose another --out")
        return
    require_free(out, (PLAN,), "latents")
    classes, entries, left_out = list_images(source)
    print(summary(len(entries), len(classes), Counter({"no pictures by their endings or places": left_out})))
    with user_files():
        out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / LISTING, "".join(f"{json.dumps(entry)}\n" for entry in entries))
    write_atomically(out / PLAN, json.dumps(plan | {"classes": classes}, indent=2) + "\n")


def encode_shard(
    source: Path, out: Path, name: str, entries: Sequence[Entry], vae: nn.Module, settings: Settings
) -> Iterator[int]:
    """Write one shard, and NAME.json last, the sign that the shard is complete; yield the numbers of images done.

    Raises:
        FloatingPointError: latents that are not finite.
    """
    posteriors, labels = [], []
    paths = [source / path for _, path in entries]
    batches = load_ahead(paths, settings.image_size, settings.batch_size, settings.workers)
    for i, results in enumerate(batches):
        batch = entries[i * settings.batch_size :][: len(results)]
        good = []
        for (label, path), image in zip(batch, results, strict=True):
            if isinstance(image, str):
                print(f"{path} is skipped: {image}", file=sys.stderr)
            else:
                good.append((label, path, image))
        if good:
            images = torch.from_numpy(np.stack([image for *_, image in good])).permute(0, 3, 1, 2)
            posterior = encode(vae, images.to(next(vae.parameters()).device)).half().cpu().numpy()
            for (_, path, _), latent in zip(good, posterior, strict=True):
                if not np.isfinite(latent).all():
                    raise FloatingPointError(f"the latents of {path} are not finite")
            posteriors.append(posterior)
            labels += [label for label, *_ in good]
        yield len(results)
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is gone")  # one error, not one per image
    if labels:
        stored = np.concatenate(posteriors)
        write_shard(out, name, stored, np.array(labels, np.int64))
    report = {"name": name, "count": len(labels), "moments": moments(stored) if labels else None}
    write_atomically(out / f"{name}.json", json.dumps(report) + "\n")


def finish(out: Path, shards: dict[str, list[Entry]], plan: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """Write latents.json, the sign that the encoding is complete; return its contents.

    Raises:
        UserError: not one image could be read.
    """
    reports = [read_json(out / f"{name}.json", "shard") for name in shards]
    total = sum(map(len, shards.values()))
    count = sum(report["count"] for report in reports)
    require(count > 0, f"not one of {total} images could be read")
    measured = measured_normalisation(reports)
    index = {
        "format": FORMAT,
        "image_size": settings.image_size,
        "classes": plan["classes"],
        "normalisation": asdict(NORMALISATION[settings.image_size] if settings.is_paper_s else measured),
        "shards": [{"name": report["name"], "count": report["count"]} for report in reports],
        "count": count,
        "skipped": total - count,
        "vae": str(Path(settings.vae).resolve()) if Path(settings.vae).is_dir() else settings.vae,
    }
    write_atomically(out / INDEX, json.dumps(index, indent=2) + "\n")
    return index


def encode_folder(
    source: Path, out: Path, settings: Settings, world: World, vae: nn.Module | None = None
) -> dict[str, Any] | None:
    """Encode a folder of images, or continue; all processes take part. Rank 0 returns the contents of latents.json.

    `vae` replaces the autoencoder that the settings name.

    Raises:
        UserError: bad input.
        FloatingPointError: see encode_shard.
    """
    require(source.is_dir(), f"{source} is not a folder")
    inside = out.resolve().is_relative_to(source.resolve())
    require(not inside, f"--out {out} lies inside {source}, where it would count as a class")
    vae = (load_vae(settings.vae) if vae is None else vae).to(world.device)  # first: a failure leaves no folder behind
    decisive = {name: value for name, value in asdict(settings).items() if name != "workers"}
    plan = {"format": FORMAT, "source": str(source.resolve())}
    world.on_first(lambda: prepare(source, out, plan | decisive))
    entries = [tuple(json.loads(line)) for line in (out / LISTING).read_text().splitlines()]
    starts = range(0, len(entries), settings.shard_size)
    shards = {f"{i:05d}": entries[start : start + settings.shard_size] for i, start in enumerate(starts)}
    todo = world.broadcast([name for name in shards if not (out / f"{name}.json").exists()])
    mine = [todo[i] for i in world.partition(len(todo))]
    total = sum(len(shards[name]) for name in mine)
    with progress(total=total, unit="image", desc="encoding", disable=not world.first) as bar:
        for name in mine:
            for done in encode_shard(source, out, name, shards[name], vae, settings):
                bar.update(done)
    world.barrier()
    return finish(out, shards, read_json(out / PLAN, "encoding"), settings) if world.first else None


def main(argv: list[str] | None = None, vae: nn.Module | None = None) -> int:
    """Run the command; `vae` replaces the autoencoder that the options name. Returns the exit status, 0."""
    command = parser()
    options = command.parse_args(argv)
    with command.errors("the same command goes on"):
        settings = Settings(**given(options, Settings))
        with distributed.process_group(options.device) as world:
            index = encode_folder(options.source, options.out, settings, world, vae)
    if index is not None:
        print(f"{index['count']} latents of {len(index['classes'])} classes: {options.out}")
        print(f"normalised by {'the constants of the paper' if settings.is_paper_s else 'what was measured'}")
        if index["skipped"]:
            print(f"{index['skipped']} images could not be read and were skipped")
    return 0


if __name__ == "__main__":
    run(main)
