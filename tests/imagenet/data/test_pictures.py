import collections
import shutil

import numpy as np
import pytest
from PIL import Image

from imagenet.data.pictures import HELD_OUT, MOST, centre_crop, hold_out, list_images, read_folder, read_pictures
from tests.imagenet.data import odd_folder


def test_centre_crop_of_a_fitting_image_is_its_middle():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 22, 3), dtype=np.uint8)
    np.testing.assert_array_equal(centre_crop(Image.fromarray(pixels), 16), pixels[:, 3:19])


def test_centre_crop_halves_by_averaging():
    """From 32 to 16 every pixel is the mean of four: reducing by one bicubic step would alias."""
    pixels = 4 * np.random.default_rng(0).integers(0, 64, (32, 32, 3), dtype=np.uint8)
    means = pixels.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.abs(centre_crop(Image.fromarray(pixels), 16) - means).max() <= 0.5


@pytest.mark.parametrize("size", [(100, 41), (7, 31), (33, 32), (640, 16)])
def test_centre_crop_of_any_shape_is_square_and_keeps_a_constant(size):
    grey = Image.new("RGB", size, (77, 77, 77))
    np.testing.assert_array_equal(centre_crop(grey, 16), np.full((16, 16, 3), 77))


def test_a_strip_is_cut_before_it_is_resized(monkeypatch):
    """A PNG of 92 bytes, 4000 x 1, took a gigabyte."""
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a))
    assert (centre_crop(Image.new("RGB", (4000, 1), (10, 200, 10)), 256) == (10, 200, 10)).all()
    assert max(max(size) for size in sizes) <= 8 * 256


def test_the_parts_of_a_data_set_are_no_classes(tmp_path, pictures):
    """The folder around train/ and val/ once had two classes of these names."""
    for name in ("train", "Val"):
        (tmp_path / name).symlink_to(pictures)
    with pytest.raises(ValueError, match="holds Val and train, parts of a data set and no classes: give one of them"):
        list_images(tmp_path)


def test_a_part_of_a_data_set_without_classes_is_one_class(tmp_path, pictures):
    """It was refused, with the advice to give what had been given."""
    (tmp_path / "train").symlink_to(pictures / "cat")
    classes, entries, _ = list_images(tmp_path / "train")
    assert (len(classes), len(entries)) == (1, 6)


def test_a_flat_folder_is_one_class_and_what_lies_beside_classes_is_counted(pictures, tmp_path):
    assert list_images(pictures / "cat") == (["cat"], [(0, f"{i}.png") for i in range(6)], 0)
    shutil.copytree(pictures, tmp_path, dirs_exist_ok=True)
    shutil.copy(tmp_path / "cat" / "0.png", tmp_path / "beside.png")
    (tmp_path / "dog" / "notes.txt").write_text("")
    classes, entries, left_out = list_images(tmp_path)
    assert (classes, len(entries), left_out) == (["cat", "dog"], 12, 2)
    shutil.copytree(pictures / "dog", tmp_path / "flat" / "deeper")
    for i in range(7):  # more than in the folder beside them: they were left out, and "deeper" was the only class
        shutil.copy(tmp_path / "beside.png", tmp_path / "flat" / f"{i}.png")
    classes, entries, left_out = list_images(tmp_path / "flat")
    assert (classes, len(entries), left_out) == (["flat"], 13, 0)


@pytest.mark.parametrize("sizes", [(100, 40, 60), (3, 1, 1, 1), (9000,), (4,) * 50, (1,) * 30])
def test_a_tenth_of_each_class_is_held_out_but_never_its_only_picture(sizes):
    entries = [(k, f"{k}/{i}.png") for k, n in enumerate(sizes) for i in range(n)]
    train, held_out = hold_out(entries)
    assert sorted(train + held_out) == sorted(entries)
    assert hold_out(entries) == (train, held_out)
    learned, held = (collections.Counter(label for label, _ in part) for part in (train, held_out))
    for k, n in enumerate(sizes):
        assert learned[k] > 0
        assert abs(held[k] - n * min(1 / HELD_OUT, MOST / len(entries))) <= 1


def test_a_folder_as_real_ones_are_is_read_once(tmp_path, capsys):
    source = tmp_path / "pictures"
    odd_folder.make(source / "odd things")
    (source / "broken").mkdir()
    (source / "broken" / "a.png").write_bytes(b"")  # no class is left of it
    for i in range(30):
        (source / "plain").mkdir(exist_ok=True)
        Image.new("L", (30, 20), 51).save(source / "plain" / f"{i}.png")
    (tmp_path / "run").mkdir()
    read_folder(source, 16, tmp_path / "run")
    out = capsys.readouterr().out
    assert "40 pictures, 2 classes, 5 skipped (2 it is no image of a known kind, 1 " in out
    (x, labels), (held_out, others), classes, brightness = read_pictures(tmp_path / "run")
    assert classes == ("odd things", "plain")
    assert x.shape == (len(labels), 3, 16, 16)
    assert len(held_out) == len(others) == 4
    assert (x[labels == 1] == 51).all()
    total = float(x.double().sum() + held_out.double().sum())
    assert brightness == pytest.approx(total / 255 / 40 / 768, abs=1e-4)
    for path in (source / "odd things").iterdir():  # the pictures have been read
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (tmp_path / "run" / "pictures.bin").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"pictures.bin cannot be read"):
        read_pictures(tmp_path / "run")


def test_a_grey_folder_has_one_channel(tmp_path):
    (tmp_path / "run").mkdir()
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for i, mode in enumerate(("L", "RGB", "RGBA", "P")):
        Image.fromarray(ramp).convert(mode).save(tmp_path / f"{i}.png")
    read_folder(tmp_path, 16, tmp_path / "run")
    stored = read_pictures(tmp_path / "run")
    assert stored.classes == (tmp_path.name,)
    assert stored.train[0].shape == (4, 1, 16, 16)
    np.testing.assert_array_equal(stored.train[0][:, 0], np.stack([ramp] * 4))


def test_a_disk_that_is_full_is_an_error_and_no_set_of_pictures(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("imagenet.data.pictures.PIXELS", "/dev/full")
    with pytest.raises(OSError, match="No space left"):
        read_folder(pictures, 64, tmp_path)
    assert not list(tmp_path.iterdir())
