import numpy as np
import torch
from pictures import GAP, grid, to_pixels


def test_pixels_round_and_clip():
    x = torch.tensor([-3.0, -1.0, -1 + 0.9 / 255, -1 + 1.1 / 255, 0.0, 1.0, 1.7]).view(1, 1, 1, 7)
    assert to_pixels(x)[0, 0, :, 1].tolist() == [0, 0, 0, 1, 128, 255, 255]


def test_pixels_are_undone_by_what_training_does():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, -1, -1)
    np.testing.assert_array_equal(to_pixels(images / 127.5 - 1), images.permute(0, 2, 3, 1))


def test_a_grid_holds_every_image_in_reading_order():
    images = np.random.default_rng(0).integers(0, 256, (7, 100, 90, 3), dtype=np.uint8)
    sheet = grid(images, columns=3)
    assert sheet.shape == (3 * 100 + 4 * GAP, 3 * 90 + 4 * GAP, 3)
    np.testing.assert_array_equal(sheet[GAP:101, GAP:91], images[0])
    np.testing.assert_array_equal(sheet[101 + GAP : 201 + GAP, 91 + GAP : 181 + GAP], images[4])
