"""Images on disk: folders of pictures and .npz files in (as a stream: they may not fit memory), PNG and .npz out."""

import math
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from tvm_ref.cli.errors import UserError, first_line

EXTENSIONS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".tif", ".tiff", ".gif"}  # of a GIF the first image
NOTES = {".json", ".txt", ".csv", ".md"}  # that may lie beside images without a word
DAMAGED = (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    SyntaxError,
)  # what a reader raises
BOMBS = Image.DecompressionBombError, Image.DecompressionBombWarning  # images of too many pixels
GAP = 1  # pixels between the images of a grid, before enlarging
SMALL = 480  # grids narrower than this are enlarged
NPZ_IMAGES, NPZ_LABELS = "arr_0", "arr_1"  # as in the .npz files of ADM


Pixels = NDArray[np.uint8]  # [B, H, W, 3]


def is_image(path: Path) -> bool:
    """Tell whether a file's name is that of a picture."""
    return path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")


def left_out(paths: Iterable[Path]) -> str | None:
    """Say which files are neither images nor notes beside them; None if there are no such files."""
    kinds = Counter(p.suffix.lower() for p in paths if not is_image(p) and not p.name.startswith("."))
    kinds = Counter({kind: n for kind, n in kinds.items() if kind not in NOTES})
    if not kinds:
        return None
    named = ", ".join(f"{kind or 'none':.80}" for kind, _ in kinds.most_common(5))
    return f"warning: {kinds.total()} files are left out, as they are no images by their endings ({named})"


def to_pixels(x: Float[Tensor, "n c h w"]) -> Pixels:
    """Convert images with values about [-1, 1] to uint8 [N, H, W, 3]: one channel is grey, three are colours.

    Of latents these are the first three channels, at half contrast.
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
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    Image.fromarray(pixels).save(partial, format="PNG")
    os.replace(partial, path)


def write_npz(path: Path, count: int, batches: Iterable[Pixels], labels: NDArray[np.int64]) -> None:
    """Write arr_0 [count, H, W, 3] and arr_1 [count], as ADM's evaluation takes them; only a batch is held at a time.

    Raises:
        ValueError: batches that do not add up to `count`.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
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
        raise UserError(f"{path}: {written} images came where {count} were announced")
    os.replace(partial, path)


class ImageFiles:
    """The images of a folder (searched to any depth, in order of names) or of a .npz file's arr_0.

    Raises:
        ValueError: no images there, or a file of another kind.
    """

    def __init__(self, source: Path):
        self.source = source
        self._paths: list[Path] = []
        self.warning: str | None = None  # of files that are left out
        if source.is_dir():
            files = [path for path in source.rglob("*") if path.is_file()]
            self._paths, self.warning = sorted(path for path in files if is_image(path)), left_out(files)
            self.count = len(self._paths)
        elif source.suffix == ".npz" and source.is_file():
            self.count = _npz_shape(source)[0]
        else:
            raise UserError(f"{source} is neither a folder of images nor a .npz file")
        if not self.count:
            raise UserError(f"{source} holds no images")

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Read images uint8 [B, 3, H, W], `size` at a time; `limit` of them in all.

        Raises:
            ValueError: an image that cannot be read, or differs in size from the first.
        """
        count = self.count if limit is None else min(limit, self.count)
        read = self._from_folder if self._paths else self._from_npz
        for batch in read(size, count):
            yield torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous()

    def _from_folder(self, size: int, count: int) -> Iterator[Pixels]:
        """Read the first `count` images of the folder."""
        h, w, _ = read_image(self._paths[0]).shape
        with ThreadPoolExecutor() as pool:
            for start in range(0, count, size):
                paths = self._paths[start : min(start + size, count)]
                yield np.stack(list(pool.map(partial(read_image, size=(w, h)), paths)))

    def _from_npz(self, size: int, count: int) -> Iterator[Pixels]:
        """Read the first `count` images of the .npz file."""
        with zipfile.ZipFile(self.source) as archive, archive.open(f"{NPZ_IMAGES}.npy") as stream:
            shape = _read_header(self.source, stream)
            for start in range(0, count, size):
                n = min(size, count - start)
                try:
                    data = bytearray(stream.read(n * math.prod(shape[1:])))
                    batch = np.frombuffer(data, np.uint8).reshape(n, *shape[1:])
                except (*DAMAGED, ValueError) as error:
                    raise UserError(f"{self.source} is damaged: {first_line(error):.80}") from None
                yield batch


def read_image(path: Path, size: tuple[int, int] | None = None) -> Pixels:
    """Read one image [H, W, 3].

    Args:
        path: the file.
        size: width and height that it must have; others are refused before they are decoded.

    Raises:
        ValueError: it cannot be decoded, or is of another size.
    """
    try:
        with Image.open(path) as image:
            if size is not None and image.size != size:
                w, h = image.size
                raise UserError(f"it is {w} x {h}, and others are {size[0]} x {size[1]}")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, MemoryError, *BOMBS) as error:
        raise UserError(f"{path} cannot be read: {first_line(error):.200}") from None


def _npz_shape(path: Path) -> tuple[int, ...]:
    """Return the shape of the images of a .npz file."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{NPZ_IMAGES}.npy") as stream:
            return _read_header(path, stream)
    except KeyError:
        raise UserError(f"{path} holds no images (an array {NPZ_IMAGES}, uint8 [N, H, W, 3])") from None
    except DAMAGED as error:
        raise UserError(f"{path} is damaged: {first_line(error):.80}") from None


def _read_header(path: Path, stream: IO[bytes]) -> tuple[int, ...]:
    """Return the shape of a .npy stream of images, which is left at the first image."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8 or fortran:
        raise UserError(f"{path}: {NPZ_IMAGES} must be uint8 [N, H, W, 3], and is {dtype} {list(shape)}")
    return shape
