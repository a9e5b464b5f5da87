import numpy as np
import pytest
from PIL import Image

from imagenet.data.pictures import centre_crop, list_images


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
