"""Folders of pictures: their classes, and each picture as a square of a given size."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from imagenet.data.image_files import Pixels, find_images, read_image
from tvm_ref.cli.errors import UserError, user_files

Entry = tuple[int, str]  # a picture of a folder: its class, and its path below the folder
PARTS = {"train", "training", "val", "valid", "validation", "test"}  # of data sets: folders that are no classes
LONGEST = 8  # ratio of an image's sides beyond which its ends are cut off before it is resized


@user_files()
def list_images(source: Path) -> tuple[list[str], list[Entry]]:
    """List the classes and images of a folder, both in order of their names, and say how many there are.

    Raises:
        UserError: no class folders with images.
    """
    folders = sorted(path.name for path in source.iterdir() if path.is_dir() and not path.name.startswith("."))
    classes: list[str] = []
    entries: list[Entry] = []
    left_out = 0
    for name in folders:
        images, others = find_images(source / name)
        left_out += others
        if images:
            entries += [(len(classes), f"{name}/{path}") for path in images]
            classes.append(name)
        else:
            print(f"warning: {source / name} holds no images and is no class")
    if not classes:
        raise UserError(f"{source} holds no images in folders; one folder of images per class is expected")
    if PARTS.issuperset(name.lower() for name in classes):
        raise UserError(f"{source} holds {' and '.join(classes)}, parts of a data set and no classes: give one of them")
    print(f"{len(entries)} images of {len(classes)} classes; {left_out} other files are left out")
    return classes, entries


def centre_crop(image: Image.Image, size: int) -> Pixels:
    """Cut the middle out of an image in RGB, resized as in ADM: uint8 [size, size, 3]."""
    if max(image.size) > LONGEST * min(image.size):  # else a strip of 4000 x 1 would be a million pixels long
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
