import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from imagenet.config import Config
from imagenet.data.image_sets import load_data
from imagenet.data.latents import FORMAT, INDEX, Latents, write_shard
from imagenet.data.noise import normal
from imagenet.data.vae import NORMALISATION
from tvm_ref.cli.errors import UserError

COUNTS = [3, 0, 5]  # the middle shard is empty: all its images were damaged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for i, n in enumerate(COUNTS):
        if n:
            posteriors = rng.random((n, 2, 4, 3, 3)).astype(np.float16)
            write_shard(tmp_path, f"{i:05d}", posteriors, np.arange(n) % 3)
    shards = [{"name": f"{i:05d}", "count": n} for i, n in enumerate(COUNTS)]
    norm = {"mean": NORMALISATION[256].mean, "std": NORMALISATION[256].std}
    index = {"format": FORMAT, "image_size": 256, "classes": ["a", "b", "c"], "normalisation": norm, "shards": shards}
    (tmp_path / INDEX).write_text(json.dumps(index))
    return tmp_path


def test_latents_are_read_across_shards(folder):
    latents = Latents(folder)
    assert len(latents) == 8
    assert latents.shape == (4, 3, 3)
    assert latents.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    for index, (shard, row) in enumerate([("00000", i) for i in range(3)] + [("00002", i) for i in range(5)]):
        stored = torch.from_numpy(np.load(folder / f"{shard}.latents.npy")[row].astype(np.float32))
        mean, std = latents.posterior(index)
        torch.testing.assert_close(torch.stack([mean, std]), stored, rtol=0, atol=0)


@pytest.mark.slow
def test_a_draw_has_the_posterior_s_moments_and_is_normalised(folder):
    latents = Latents(folder, seed=3)
    draws = torch.stack([latents.normalisation.denormalise(latents.batch([4], k)[0][0]) for k in range(2000)])
    mean, std = latents.posterior(4)
    z = (draws - mean) / std  # N(0, 1): 36 elements, 2,000 draws
    assert z.mean(0).abs().max() < 5 / 2000**0.5
    assert (z.var(0) - 1).abs().max() < 5 * (2 / 2000) ** 0.5


def test_a_draw_is_a_function_of_seed_draw_and_index_alone(folder):
    latents = Latents(folder, seed=1)
    x, labels = latents.batch([5, 0, 5], draw=7)
    assert torch.equal(x[0], x[2])
    assert torch.equal(x[1], Latents(folder, seed=1).batch([0], 7)[0][0])
    assert labels.tolist() == [2, 0, 2]
    assert not torch.equal(x[0], latents.batch([5], 8)[0][0])
    assert not torch.equal(x[0], Latents(folder, seed=2).batch([5], 7)[0][0])


def test_noise_of_different_keys_is_uncorrelated():
    noise = torch.stack([normal((4096,), *key) for key in ((1, 0, 0, 1), (1, 0, 1, 0), (2, 0, 0, 1), (1, 1, 0, 0))])
    assert (torch.corrcoef(noise) - torch.eye(4)).abs().max() < 5 / 4096**0.5


def truncate(folder: Path) -> None:
    path = folder / "00000.latents.npy"
    path.write_bytes(path.read_bytes()[:-10])


def change(folder: Path, **entries: object) -> None:
    (folder / INDEX).write_text(json.dumps(json.loads((folder / INDEX).read_text()) | entries))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / INDEX).unlink(), "no latents.json"),
        (lambda f: (f / INDEX).write_text("{"), "is damaged"),
        (lambda f: change(f, format="another"), "not in the format"),
        (lambda f: change(f, shards=[{"name": "../../x", "count": 1}]), "shard x cannot be read"),
        (lambda f: change(f, normalisation={"mean": ["a"] * 4, "std": [1.0] * 4}), "is damaged"),
        (truncate, "shard 00000 cannot be read"),
    ],
)
def test_damaged_latents_are_named(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        Latents(folder)


CONFIG = Config(data="latents", input_size=3, in_channels=4, classes=3, patch_size=3, batch_size=8, steps=2)


@pytest.mark.parametrize("classes", [2, 1000])
def test_another_number_of_classes_is_refused(folder, classes):
    """A model of 1000 classes once learned from a folder of ten, without a word."""
    with pytest.raises(UserError, match=f"the data have 3 classes, the configuration {classes}"):
        load_data(replace(CONFIG, classes=classes), folder)


def test_latents_that_are_not_finite_are_named_by_file_and_row(folder):
    """A training that they stopped could not go on, and nothing said which file was damaged."""
    stored = np.load(folder / "00002.latents.npy")
    stored[4, 1, 2, 0, 0] = np.nan
    np.save(folder / "00002.latents.npy", stored)
    with pytest.warns(UserWarning, match=r"00002.latents.npy, row 4: numbers that are not finite"):
        Latents(folder).batch([0, 7], 0)
