"""Frechet distance, precision and recall of pooled pictures."""

import numpy as np
import pytest
import torch

from imagenet.config import Config
from imagenet.metrics.own import measure_model, sets_of
from imagenet.metrics.pictures import PictureMetrics, pooled
from imagenet.sampler import BATCH, Generator

CHANNELS, SIDE = 3, 16


def noise(n, mean, std, seed):
    """Pictures uint8 whose pixels are independent."""
    x = mean + std * torch.randn(n, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))
    return x.round().clamp(0, 255).byte()


def in_range(x):
    return x / 127.5 - 1


def test_pooling_takes_means_of_squares():
    x = noise(5, 128, 40, 0)
    means = x.double().view(5, CHANNELS, 8, 2, 8, 2).mean((3, 5)) / 255
    np.testing.assert_allclose(pooled(in_range(x)), means.flatten(1), atol=1e-6)
    assert pooled(torch.zeros(2, 1, 4, 4)).shape == (2, 16)  # no finer than the pictures


def test_a_shift_of_all_pixels_is_its_square_times_their_number():
    train, held_out = noise(400, 128, 20, 0), noise(40, 128, 20, 1)
    metrics = PictureMetrics(train, held_out, torch.zeros(40))
    same = metrics.measure(in_range(train))
    shifted = metrics.measure(in_range(train + 51))
    assert same["frechet"] == pytest.approx(0, abs=1e-4)
    assert shifted["frechet"] == pytest.approx(0.2**2 * CHANNELS * 64, rel=1e-3)
    assert shifted["brightness"] == pytest.approx(same["brightness"] + 0.2, abs=1e-3)
    assert (same["precision"], same["recall"]) == (1, 1)
    assert (shifted["precision"], shifted["recall"]) == (0, 0)
    assert metrics.measure(in_range(held_out))["frechet"] == same["frechet_held_out"] > 0


def test_one_picture_again_and_again_is_precise_and_recalls_little():
    train = noise(200, 128, 20, 0)
    found = PictureMetrics(train, noise(20, 128, 20, 1), torch.zeros(20)).measure(
        in_range(train[:1].repeat(20, 1, 1, 1))
    )
    assert found["precision"] == 1
    assert found["recall"] <= 1 / 200


@pytest.mark.parametrize(("held_out", "sets"), [(4, 8), (360, 8), (1000, 2), (5000, 1)])
def test_few_pictures_do_not_make_many_sets(held_out, sets):
    train = noise(20, 128, 20, 0)
    metrics = PictureMetrics(train, train, torch.zeros(held_out))
    assert sets_of(metrics) == sets


def test_sets_are_drawn_in_parts_that_fit_the_memory():
    """As many pictures as are held out once went through the network at once."""
    drawn = []

    class Model(Generator):
        def samples(self, numbers, steps):
            drawn.append(list(numbers))
            return in_range(noise(len(numbers), 128, 20, 0))

    metrics = PictureMetrics(noise(200, 128, 20, 0), noise(150, 128, 20, 1), torch.zeros(150))
    measure_model(Model(torch.nn.Identity(), Config()), [1], metrics)
    assert max(map(len, drawn)) == BATCH
    assert [i for part in drawn for i in part] == list(range(sets_of(metrics) * 150))
