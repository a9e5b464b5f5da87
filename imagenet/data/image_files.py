"""Read folders of pictures and .npz files (as streams: they may not fit in memory); write PNG, .npz and grids.

Pictures come in all modes and shapes. Here each becomes upright, in RGB of 8 bits, white where it is transparent.
Floating-point numbers, whose scale is unknown, are refused.
"""

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from tvm_ref.cli.errors import UserError, first_line, require, user_errors

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}  # the first image of a GIF
DAMAGED = zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError  # raised by readers of .npz files
NPZ_IMAGES, NPZ_LABELS = "arr_0", "arr_1"  # as in the .npz files of ADM
GAP = 1  # pixels between the images of a grid, before enlarging
SMALL = 480  # grids narrower than this are enlarged

Pixels = NDArray[np.uint8]  # [B, H, W, 3]


def to_pixels(x: Float[Tensor, "n c h w"]) -> Pixels:
    """Convert images with values about [-1, 1] to uint8 [N, H, W, 3]: one channel is grey, three are colours.

    For latents these are the first three channels, at half contrast.
    """
    x = x.float().cpu()
    if x.shape[1] not in (1, 3):
        x = x[:, :3] / 2
    x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def grid(images: Pixels, columns: int) -> Pixels:
    """Arrange images [N, H, W, 3] in rows of `columns`, on white, as one image [H', W', 3]."""
    n, h, w, _ = images.shape
    rows = -(-n // columns)
    canvas = np.full((rows * (h + GAP) + GAP, columns * (w + GAP) + GAP, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = GAP + i // columns * (h + GAP), GAP + i % columns * (w + GAP)
        canvas[y : y + h, x : x + w] = image
    factor = max(1, -(-SMALL // canvas.shape[1]))
    return canvas.repeat(factor, 0).repeat(factor, 1)


def save_png(path: Path, pixels: Pixels) -> None:
    """Write one image [H, W, 3]."""
    partial = path.with_name(f"{path.name}.partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    os.replace(partial, path)


def write_npz(path: Path, count: int, batches: Iterable[Pixels], labels: NDArray[np.int64]) -> None:
    """Write arr_0 [count, H, W, 3] and arr_1 [count], as ADM's evaluation expects them, a batch at a time.

    Raises:
        ValueError: batches that do not add up to `count`.
    """
    partial = path.with_name(f"{path.name}.partial")
    written = 0
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(f"{NPZ_IMAGES}.npy", "w", force_zip64=True) as stream:
            for batch in batches:
                if not written:
                    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *batch.shape[1:])}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(np.ascontiguousarray(batch).data)
                written += len(batch)
        with archive.open(f"{NPZ_LABELS}.npy", "w") as stream:
            np.lib.format.write_array(stream, labels, allow_pickle=False)
    if written != count:
        partial.unlink()
        raise ValueError(f"{path}: {written} images came where {count} were announced")
    os.replace(partial, path)


def find_images(source: Path) -> tuple[list[str], int]:
    """Find the pictures below a folder, at any depth, and count the files whose endings are not those of pictures.

    Hidden files and folders are ignored; links are followed, but no folder twice. Pictures are paths below the
    folder, in order of names; a link to nothing is a picture that cannot be read.
    """
    found, left_out = [], 0
    folders = {os.path.realpath(source)}  # entered so far: a link can lead back
    for folder, below, files in os.walk(source, followlinks=True):
        inside = {os.path.realpath(os.path.join(folder, name)): name for name in below if name[0] != "."}
        below[:] = [name for place, name in inside.items() if place not in folders]
        folders.update(inside)
        for name in files:
            if name[0] == ".":
                continue
            if os.path.splitext(name)[1].lower() in EXTENSIONS:
                found.append(os.path.relpath(os.path.join(folder, name), source))
            else:
                left_out += 1
    return sorted(found), left_out


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a picture, upright and in RGB.

    Args:
        path: the file.
        size: width and height that it must have; others are refused before they are decoded.

    Raises:
        UserError: it cannot be decoded, or is of another size; the reason, without the path.
        OSError: there is no such file, or it may not be read.
    """
    with path.open("rb") as stream:
        try:
            with Image.open(stream) as image:
                if size is not None and image.size != size:
                    w, h = image.size
                    raise UserError(f"it is {w} x {h}, and others are {size[0]} x {size[1]}")
                return _to_rgb(ImageOps.exif_transpose(image))
        except UnidentifiedImageError:
            raise UserError("it is no image of a known kind") from None
        except UserError:
            raise
        except Exception as error:  # a damaged file can break a decoder anywhere
            raise UserError(f"{first_line(error):.200}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert a picture of any mode to 8 bits of red, green and blue, on white where it is transparent."""
    require(image.mode != "F", "it holds floating-point numbers of unknown scale")
    if image.mode.startswith("I"):  # Pillow would cut 16 bits off at 255
        values = np.asarray(image)
        require(values.min() >= 0 and values.max() <= 65535, "it holds 32-bit numbers of unknown scale")
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


class ImageFiles:
    """The images of a folder (searched to any depth, in order of names) or of a .npz file's arr_0, all of one size.

    Raises:
        UserError: no images there, or a file of another kind.
    """

    def __init__(self, source: Path):
        self.source = source
        self._paths: list[Path] = []
        self.left_out = 0  # files of the folder without an image's ending
        if source.is_dir():
            names, self.left_out = find_images(source)
            self._paths = [source / name for name in names]
            self.count = len(self._paths)
        elif source.suffix == ".npz" and source.is_file():
            with _open_npz(source) as (shape, _):
                self.count = shape[0]
        else:
            raise UserError(f"{source} is neither a folder of images nor a .npz file")
        require(self.count > 0, f"{source} holds no images")

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Read images uint8 [B, 3, H, W], `size` at a time; `limit` of them in all.

        Raises:
            UserError: an image that cannot be read, or differs in size from the first.
        """
        count = self.count if limit is None else min(limit, self.count)
        read = self._from_folder if self._paths else self._from_npz
        for batch in read(size, count):
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()

    def _from_folder(self, size: int, count: int) -> Iterator[Pixels]:
        """Read the first `count` images of the folder."""
        first = _pixels(self._paths[0])
        read = partial(_pixels, size=(first.shape[1], first.shape[0]))
        with ThreadPoolExecutor() as pool:
            for start in range(0, count, size):
                yield np.stack(list(pool.map(read, self._paths[start : min(start + size, count)])))

    def _from_npz(self, size: int, count: int) -> Iterator[Pixels]:
        """Read the first `count` images of the .npz file."""
        with _open_npz(self.source) as (shape, stream):
            for start in range(0, count, size):
                n = min(size, count - start)
                yield np.frombuffer(bytearray(stream.read(n * math.prod(shape[1:]))), np.uint8).reshape(n, *shape[1:])


def _pixels(path: Path, size: tuple[int, int] | None = None) -> Pixels:
    """Read one image [H, W, 3] of a given width and height."""
    try:
        return np.array(read_image(path, size))
    except (UserError, OSError) as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from None


def array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, Any]:
    """Read shape, order (whether Fortran's) and dtype of an array in a .npz file."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


@contextlib.contextmanager
def _open_npz(path: Path) -> Iterator[tuple[tuple[int, ...], IO[bytes]]]:
    """Open a .npz file of images: their shape, and a stream that is at the first of them."""
    reading = user_errors(f"{path} cannot be read", KeyError, *DAMAGED)
    with reading, zipfile.ZipFile(path) as archive, archive.open(f"{NPZ_IMAGES}.npy") as stream:
        shape, fortran, dtype = array_header(stream)
        right = len(shape) == 4 and shape[3] == 3 and dtype == np.uint8 and not fortran
        require(right, f"{NPZ_IMAGES} must be uint8 [N, H, W, 3], and is {dtype} {list(shape)}")
        yield shape, stream
