"""A folder of pictures as real ones are: all modes and shapes, damaged files, hidden ones, links."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image

GREY = np.arange(1600, dtype=np.uint8).reshape(40, 40)
COLOUR = np.random.default_rng(0).integers(0, 255, (60, 40, 3), dtype=np.uint8)


def make(folder: Path) -> Path:
    """Fill a new folder."""
    (folder / ".thumbnails").mkdir(parents=True)
    colour = Image.fromarray(COLOUR)
    colour.save(folder / "colour.png")
    colour.convert("P").save(folder / "palette.png")
    colour.convert("CMYK").save(folder / "cmyk.jpg")
    colour.save(folder / "снимок № 1.webp")
    transparent = colour.convert("RGBA")
    transparent.putalpha(Image.fromarray(np.repeat(np.array([0, 255], np.uint8), 1200).reshape(60, 40)))
    transparent.save(folder / "transparent.png")
    Image.fromarray(GREY).save(folder / "eight_bits.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "sixteen_bits.png")
    Image.fromarray(GREY.astype(np.uint16) * 257).save(folder / "sixteen_bits.tif")
    Image.fromarray(GREY.astype(np.float32)).save(folder / "float.tiff")
    exif = Image.Exif()
    exif[0x112] = 6  # lies on its side
    colour.save(folder / "sideways.png", exif=exif)
    whole = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (200, 200, 3), dtype=np.uint8)).save(whole, "JPEG")
    (folder / "truncated.jpg").write_bytes(whole.getvalue()[:9000])
    (folder / "empty.png").write_bytes(b"")
    (folder / ".DS_Store").write_bytes(b"Bud1")
    colour.save(folder / ".thumbnails" / "colour.png")
    os.symlink(folder / "colour.png", folder / "link.png")
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink(folder, folder / "loop")
    return folder
