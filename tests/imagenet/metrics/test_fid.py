"""What is seen of a model while it trains: pictures of its latents, and how far they are from real ones."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import train
from imagenet.config import Config, build_model
from imagenet.distributed import World
from imagenet.metrics.fid import Fid, make_metric
from imagenet.metrics.frechet import frechet_distance, gaussian_statistics
from imagenet.metrics.inception import Features
from imagenet.metrics.references import Reference, read_reference
from imagenet.sampler import Generator, load_generator
from tests.imagenet.commands import ON_LATENTS, command
from tests.imagenet.workers import randomise


def rows(images):
    """An extractor of known features: the mean of each channel and row."""
    x = images.double().mean(3).flatten(1) / 255
    return Features(x, x)


def of(generator, count, steps=1):
    images = np.concatenate(list(generator.batches(range(count), steps)))
    return gaussian_statistics(rows(torch.from_numpy(images).permute(0, 3, 1, 2)).pool)


REFERENCE = Reference("real", gaussian_statistics(torch.rand(40, 24, generator=torch.Generator().manual_seed(0))))


def test_fid_of_all_processes_is_that_of_all_images(monkeypatch):
    """Each of three sums over its share; what they add up to is the distance of all 150 images."""
    config = Config(hidden_size=16, depth=1)
    generator = Generator(randomise(build_model(config)), config)
    expected, sums = of(generator, 150, 2), []
    fid = Fid(REFERENCE, rows, 150)
    with monkeypatch.context() as patch:
        patch.setattr(World, "sum", lambda self, a: sums.append(a) or a)
        for rank in range(3):
            fid.statistics(generator, 2, World(rank, 3))
    totals = iter((sums[0] + sums[2] + sums[4], sums[1] + sums[3] + sums[5]))
    monkeypatch.setattr(World, "sum", lambda self, a: next(totals))
    found = fid(generator, 2, World(0, 3))["fid"]
    assert found == pytest.approx(frechet_distance(*expected, *REFERENCE.pool), rel=1e-9)


def test_what_cannot_be_measured_is_refused(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "small.npz", mu=np.zeros(2), sigma=np.eye(2))
    with pytest.raises(ValueError, match=r"images.npz holds no mu and sigma"):
        Fid(read_reference(tmp_path / "images.npz"), rows, 10)
    with pytest.raises(ValueError, match="10 is no multiple of 3 processes"):
        make_metric(Config(), tmp_path / "small.npz", None, 10, World(0, 3))
    config = Config(hidden_size=16, depth=1)
    with pytest.raises(ValueError, match=r"small.npz holds statistics of 2 numbers, where features have 24"):
        Fid(read_reference(tmp_path / "small.npz"), rows, 10)(Generator(build_model(config), config), 1, World())


def test_training_on_latents_shows_pictures_and_measures_them(latents, tmp_path):
    """Grids once showed the latents' channels."""
    reference = Reference("real", gaussian_statistics(torch.rand(60, 48)))
    fid = Fid(reference, rows, 20)
    options = [*ON_LATENTS, "--data-path", str(latents), "--steps", "2", "--save-every", "2", "--evaluate-every", "1"]
    assert train.main([*options, "--out", str(tmp_path / "run")], metric=fid) == 0
    generator = load_generator(tmp_path / "run")
    assert generator.vae is not None
    for name in ("samples/00000002.png", "samples-1.png"):
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / "run" / name)), generator.grid(1))
    lines = [json.loads(line) for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[1]["nfe"]["1"]["fid"] == pytest.approx(frechet_distance(*of(generator, 20), *reference.pool), rel=1e-6)


@pytest.mark.slow
def test_where_the_autoencoder_cannot_be_had_grids_show_latents(latents, vae, tmp_path, capsys):
    shutil.copytree(latents, tmp_path / "latents")
    index = json.loads((latents / "latents.json").read_text()) | {"vae": str(tmp_path / "elsewhere" / vae.name)}
    (tmp_path / "latents" / "latents.json").write_text(json.dumps(index))
    assert command(tmp_path / "run", "--data-path", tmp_path / "latents", "--steps", 1, base=ON_LATENTS) == 0
    assert "elsewhere/tiny here, and it could not be fetched" in capsys.readouterr().out
    shown = np.array(Image.open(tmp_path / "run" / "samples-1.png"))
    pictures = load_generator(tmp_path / "run", vae=str(vae)).grid(1)  # the same autoencoder in another place
    assert pictures.shape != shown.shape or not np.array_equal(shown, pictures)
