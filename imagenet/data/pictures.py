"""Folders of pictures: their classes, each picture as a square, and the pictures that a run has read.

A training on such a folder reads it once, into two files in the folder of the run:

    pictures.bin     uint8 [N, S, S, 3]: the pictures to learn from, then those that are held out
    pictures.json    their side S, channels, classes and labels, ...; written last
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from imagenet.data.image_files import EXTENSIONS, Pixels, find_images, read_image
from tvm_ref.cli.errors import UserError, user_files
from tvm_ref.cli.files import read_json, write_atomically
from tvm_ref.cli.progress import progress

Entry = tuple[int, str]  # a picture of a folder: its class, and its path below the folder
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # folders that are parts of a data set, not classes
LONGEST = 8  # ratio of sides beyond which an image's ends are cut off before it is resized
PIXELS, INDEX = "pictures.bin", "pictures.json"
HELD_OUT, MOST = 10, 500  # one picture in HELD_OUT is held out for metrics, at most MOST in all
BATCH, THREADS = 64, 8  # pictures per read, and number of threads


@user_files()
def list_images(source: Path) -> tuple[list[str], list[Entry], int]:
    """List the classes and pictures of a folder, both in order of their names, and count its other files.

    Its folders that hold pictures, at any depth, are the classes; but if more pictures lie next to them than in them,
    the whole folder is one class.

    Raises:
        UserError: no pictures, or parts of a data set instead of classes.
    """
    folders = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes: list[str] = []
    entries: list[Entry] = []
    beside = [path for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    left_out = len(beside)
    for name in folders:
        images, others = find_images(source / name)
        left_out += others
        if images:
            entries += [(len(classes), f"{name}/{path}") for path in images]
            classes.append(name)
        else:
            print(f"warning: {source / name} holds no images and is no class")
    if sum(path.suffix.lower() in EXTENSIONS for path in beside) > len(entries):
        images, left_out = find_images(source)
        classes, entries = [source.resolve().name], [(0, path) for path in images]
    elif classes and PARTS.issuperset(name.lower() for name in classes):
        raise UserError(f"{source} holds {' and '.join(classes)}, parts of a data set and no classes: give one of them")
    if not entries:
        raise UserError(f"{source} holds no images")
    return classes, entries, left_out


def summary(count: int, classes: int, skipped: Counter[str]) -> str:
    """Describe the number of pictures, of classes, and of skipped files, with the reasons."""
    reasons = ", ".join(f"{n} {reason}" for reason, n in skipped.most_common() if n)
    words = f"{count} pictures, {classes} class{'es' * (classes > 1)}, {skipped.total()} skipped"
    return f"{words} ({reasons})" if reasons else words


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """Cut the middle out of an image in RGB, resized as in ADM: uint8 [size, size, 3]."""
    if max(image.size) > LONGEST * min(image.size):  # else a strip of 4000 x 1 would become a million pixels long
        w, h = (min(side, LONGEST * min(image.size)) for side in image.size)
        left, top = (image.width - w) // 2, (image.height - h) // 2
        image = image.crop((left, top, left + w, top + h))
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def load(path: Path, size: int) -> Pixels | str:
    """Read an image and crop it, or return the reason why it cannot be read."""
    try:
        return centre_crop(read_image(path), size)
    except UserError as error:
        return str(error)
    except (FileNotFoundError, PermissionError) as error:  # other faults are the disk's
        return str(error.strerror)


def load_ahead(paths: Sequence[Path], size: int, batch_size: int, workers: int) -> Iterator[list[Pixels | str]]:
    """Load images, a batch at a time; the next batch is read while the caller works on this one."""
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[Pixels | str]] = []
        for start in range(0, len(paths) + batch_size, batch_size):
            following = [pool.submit(load, path, size) for path in paths[start : start + batch_size]]
            if pending:
                yield [result.result() for result in pending]
            pending = following


def hold_out(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
    """Split pictures at random into training and held-out ones, in proportion to the classes."""
    keys = np.random.default_rng(0).random(len(entries)).tolist()
    mixed = [entry for _, _, entry in sorted((entry[0], key, entry) for key, entry in zip(keys, entries, strict=True))]
    every = max(HELD_OUT, -(-len(entries) // MOST))
    places = range(every - 1, len(mixed), every)
    held = {mixed[i] for i in places if mixed[i][0] == mixed[i - 1][0]}  # never the only one of its class
    return sorted(set(entries) - held), sorted(held)


def read_folder(source: Path, size: int, out: Path) -> None:
    """Read the pictures of a folder, cropped to size x size, into the folder of a run, and say how many there are.

    Raises:
        UserError: no pictures that can be read.
    """
    names, entries, left_out = list_images(source)
    train, held_out = hold_out(entries)
    order = train + held_out
    skipped = Counter({"no pictures by their endings or places": left_out})
    labels: list[int] = []
    images = chain.from_iterable(load_ahead([source / path for _, path in order], size, BATCH, THREADS))
    learned, grey, brightness = 0, True, 0.0
    (out / INDEX).unlink(missing_ok=True)
    with (out / PIXELS).open("wb") as file:
        bar = progress(images, "reading", len(entries), leave=False, unit="picture")
        for i, ((label, path), image) in enumerate(zip(order, bar, strict=True)):
            if isinstance(image, str):
                skipped[image] += 1
                print(f"{path} is skipped: {image}", file=sys.stderr)
            else:
                file.write(image.tobytes())
                labels.append(label)
                learned += i < len(train)
                grey = grey and bool((image == image[..., :1]).all())
                brightness += float(image.mean()) / 255
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is gone")  # one error, not one per picture
    if not learned:
        raise UserError(f"not one of {len(entries)} pictures in {source} could be read")
    kept, numbers = np.unique(labels, return_inverse=True)  # classes whose pictures can be read
    index = {
        "size": size, "channels": 1 if grey else 3, "classes": [names[k] for k in kept], "labels": numbers.tolist(),
        "held_out": len(labels) - learned, "brightness": round(brightness / len(labels), 4),
    }  # fmt: skip
    print(summary(len(labels), len(kept), skipped))
    print(f"{'grey' if grey else 'coloured'}, mean brightness {index['brightness']}, {index['held_out']} held out")
    write_atomically(out / INDEX, json.dumps(index) + "\n")


class Pictures(NamedTuple):
    """The pictures that a run has read: uint8 [N, C, S, S], memory-mapped, with labels [N].

    Attributes:
        train: those to learn from.
        test: those held out.
        classes: names of the classes, by number.
        brightness: mean of all pixels, from black 0 to white 1.
    """

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    classes: tuple[str, ...]
    brightness: float


def read_pictures(folder: Path) -> Pictures:
    """Open the pictures in the folder of a run.

    Raises:
        UserError: none there, or damaged files.
    """
    about = read_json(
        folder / INDEX, "run's pictures", ("size", "channels", "classes", "labels", "held_out", "brightness")
    )
    n, size = len(about["labels"]), about["size"]
    try:
        stored = np.memmap(folder / PIXELS, np.uint8, "c", shape=(n, size, size, 3))  # copy on write
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / PIXELS} cannot be read: {error}") from None
    x, y = torch.from_numpy(stored).permute(0, 3, 1, 2)[:, : about["channels"]], torch.tensor(about["labels"])
    first = n - about["held_out"]
    return Pictures((x[:first], y[:first]), (x[first:], y[first:]), tuple(about["classes"]), about["brightness"])
