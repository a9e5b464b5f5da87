from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet.data.image_files import (
    GAP,
    SMALL,
    ImageFiles,
    find_images,
    grid,
    read_image,
    save_png,
    to_pixels,
    write_npz,
)
from tests.imagenet.data import odd_folder

rng = np.random.default_rng(0)
PIXELS = rng.integers(0, 256, (7, 5, 6, 3), dtype=np.uint8)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    write_npz(tmp_path / "images.npz", 7, iter([PIXELS[:4], PIXELS[4:]]), np.arange(7))
    return tmp_path / "images.npz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "below").mkdir(parents=True)
    for i, image in enumerate(PIXELS):
        save_png(tmp_path / "images" / ("below" if i == 6 else "") / f"{i:03d}.png", image)
    (tmp_path / "images" / "notes.txt").write_text("")
    return tmp_path / "images"


def test_an_npz_is_what_numpy_reads(npz):
    with np.load(npz) as stored:
        np.testing.assert_array_equal(stored["arr_0"], PIXELS)
        assert stored["arr_1"].tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["npz", "folder"])
@pytest.mark.parametrize("size", [3, 100])
def test_images_are_read_as_they_were_written(kind, size, request):
    images = ImageFiles(request.getfixturevalue(kind))
    assert len(images) == 7
    batches = list(images.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1), PIXELS)
    assert len(torch.cat(list(images.batches(size, limit=5)))) == 5


@pytest.mark.parametrize("copies", [1, 1000])  # found on opening, and on the way
def test_a_damaged_npz_is_named(tmp_path, copies):
    write_npz(tmp_path / "images.npz", 7 * copies, [PIXELS] * copies, np.arange(7 * copies))
    data = bytearray((tmp_path / "images.npz").read_bytes())
    data[data.rindex(PIXELS[3].tobytes())] ^= 1
    (tmp_path / "images.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"images.npz cannot be read: Bad CRC"):
        list(ImageFiles(tmp_path / "images.npz").batches(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.savez(p / "a.npz", mu=np.zeros(3)), "no item named 'arr_0.npy'"),
        (lambda p: np.savez(p / "a.npz", arr_0=np.zeros((2, 4, 4, 3))), "must be uint8"),
        (lambda p: (p / "a.npz").write_bytes(b"PK\x03\x04"), "cannot be read"),
        (lambda p: None, "neither a folder"),
    ],
)
def test_what_holds_no_images_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageFiles(tmp_path / "a.npz")


def test_images_that_cannot_be_read_or_differ_in_size_are_named(folder):
    save_png(folder / "003.png", PIXELS[3, :4])
    with pytest.raises(ValueError, match=r"003.png cannot be read: it is 6 x 4, and others are 6 x 5"):
        list(ImageFiles(folder).batches(2))
    (folder / "002.png").write_bytes((folder / "002.png").read_bytes()[:40])
    with pytest.raises(ValueError, match=r"002.png cannot be read"):
        list(ImageFiles(folder).batches(2))


def test_an_image_of_too_many_pixels_is_named(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # of which a PNG of a hundred bytes can claim 10^10
    with pytest.raises(ValueError, match=r"000.png cannot be read: Image size .* exceeds limit"):
        list(ImageFiles(folder).batches(2))


def test_an_image_of_another_size_is_refused_before_it_is_decoded(folder, monkeypatch):
    """64 photographs of 100 megapixels among samples would fill the memory before their sizes were compared."""
    save_png(folder / "004.png", np.zeros((50, 50, 3), np.uint8))
    decoded = []
    monkeypatch.setattr(Image.Image, "convert", lambda self, mode: decoded.append(self.size) or self)
    with pytest.raises(ValueError, match="it is 50 x 50"):
        list(ImageFiles(folder).batches(2))
    assert (50, 50) not in decoded


def test_files_that_are_no_images_are_counted(folder):
    for name in ("a.heic", "noend", ".hidden"):
        (folder / name).write_text("")
    assert ImageFiles(folder).left_out == 3  # with notes.txt


def test_pixels_round_and_clip():
    x = torch.tensor([-3.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.0, 1.0, 1.7]).view(1, 1, 1, 7)
    assert to_pixels(x)[0, 0, :, 1].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_pixels_are_undone_by_what_training_does():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    np.testing.assert_array_equal(to_pixels(images / 127.5 - 1), images.permute(0, 2, 3, 1))


def test_a_grid_holds_every_image_in_reading_order():
    h, w = 100, SMALL  # large enough not to be enlarged
    images = np.random.default_rng(0).integers(0, 256, (7, h, w, 3), dtype=np.uint8)
    sheet = grid(images, columns=3)
    assert sheet.shape == (3 * h + 4 * GAP, 3 * w + 4 * GAP, 3)
    for number, row, column in ((0, 0, 0), (4, 1, 1), (6, 2, 0)):
        y, x = GAP + row * (h + GAP), GAP + column * (w + GAP)
        np.testing.assert_array_equal(sheet[y : y + h, x : x + w], images[number])


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    return odd_folder.make(tmp_path / "odd")


def test_each_folder_is_entered_once(odd):
    """A folder that links to itself once held each picture 41 times, and thumbnails were pictures."""
    images, _ = find_images(odd)
    hidden = {".thumbnails", ".DS_Store", "loop"}
    assert images == sorted(path.name for path in odd.iterdir() if path.name not in hidden)
    (odd / "second").symlink_to(odd / ".thumbnails")  # links to what lies elsewhere are followed
    assert find_images(odd)[0] == sorted([*images, "second/colour.png"])


def test_16_bits_look_as_8_do(odd):
    """They once were cut off at 255."""
    for name in ("palette.png", "cmyk.jpg", "снимок № 1.webp"):  # other kinds are read as well
        assert read_image(odd / name).size == (40, 60)
    for name in ("eight_bits.png", "sixteen_bits.png", "sixteen_bits.tif"):
        np.testing.assert_array_equal(np.array(read_image(odd / name)), np.repeat(odd_folder.GREY[..., None], 3, 2))


def test_a_picture_that_lies_on_its_side_is_turned(odd):
    np.testing.assert_array_equal(np.array(read_image(odd / "sideways.png")), np.rot90(odd_folder.COLOUR, -1))


def test_what_is_transparent_is_white(odd):
    found = np.array(read_image(odd / "transparent.png"))
    assert (found[:30] == 255).all()
    np.testing.assert_array_equal(found[30:], odd_folder.COLOUR[30:])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("float.tiff", "floating-point numbers of unknown scale"),
        ("truncated.jpg", "image file is truncated"),
        ("empty.png", "no image of a known kind"),
        ("dangling.png", "No such file"),
    ],
)
def test_a_picture_that_cannot_be_read_has_a_reason(odd, name, message):
    with pytest.raises((ValueError, OSError), match=message):
        read_image(odd / name)
