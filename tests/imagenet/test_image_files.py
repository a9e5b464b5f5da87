from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet.image_files import ImageFiles, save_png, write_npz

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
@pytest.mark.parametrize("size", [1, 3, 7, 100])
def test_images_are_read_as_they_were_written(kind, size, request):
    images = ImageFiles(request.getfixturevalue(kind))
    assert len(images) == 7
    batches = list(images.batches(size))
    assert all(len(batch) == size for batch in batches[:-1])
    order = [0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(torch.cat(batches).permute(0, 2, 3, 1), PIXELS[order])
    assert len(torch.cat(list(images.batches(size, limit=5)))) == 5


def test_an_npz_with_fewer_images_than_announced_is_not_left_behind(tmp_path):
    with pytest.raises(ValueError, match="7 images came where 8"):
        write_npz(tmp_path / "images.npz", 8, [PIXELS], np.arange(8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("copies", [1, 1000])  # found on opening, and on the way
def test_a_damaged_npz_is_named(tmp_path, copies):
    write_npz(tmp_path / "images.npz", 7 * copies, [PIXELS] * copies, np.arange(7 * copies))
    data = bytearray((tmp_path / "images.npz").read_bytes())
    data[data.rindex(PIXELS[3].tobytes())] ^= 1
    (tmp_path / "images.npz").write_bytes(data)
    with pytest.raises(ValueError, match=r"images.npz is damaged: Bad CRC"):
        list(ImageFiles(tmp_path / "images.npz").batches(3))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: np.savez(p / "a.npz", mu=np.zeros(3)), "holds no images"),
        (lambda p: np.savez(p / "a.npz", arr_0=np.zeros((2, 4, 4, 3))), "must be uint8"),
        (lambda p: np.savez(p / "a.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "holds no images"),
        (lambda p: (p / "a.npz").write_bytes(b"PK\x03\x04"), "is damaged"),
        (lambda p: (p / "a.npz").mkdir(), "holds no images"),
        (lambda p: None, "neither a folder"),
    ],
)
def test_what_holds_no_images_is_named(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        ImageFiles(tmp_path / "a.npz")


def test_images_that_cannot_be_read_or_differ_in_size_are_named(folder):
    save_png(folder / "003.png", PIXELS[3, :4])
    with pytest.raises(ValueError, match=r"003.png is 6 x 4, and others are 6 x 5"):
        list(ImageFiles(folder).batches(2))
    cut(folder / "002.png")
    with pytest.raises(ValueError, match=r"002.png cannot be read"):
        list(ImageFiles(folder).batches(2))
