import numpy as np
import torch

from imagenet.data.pictures import GAP, SMALL, grid, to_pixels


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


def test_small_grids_are_enlarged_pixel_by_pixel():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    sheet = grid(images, columns=2)
    factor = sheet.shape[1] // (2 * 8 + 3 * GAP)
    assert sheet.shape[1] >= SMALL
    np.testing.assert_array_equal(sheet[GAP * factor : (GAP + 8) * factor, GAP * factor : (GAP + 8) * factor],
                                  images[0].repeat(factor, 0).repeat(factor, 1))  # fmt: skip
