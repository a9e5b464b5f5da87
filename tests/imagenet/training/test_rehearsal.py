"""A whole project in small, by the commands that a large one takes."""

import json

import numpy as np
import pytest

from imagenet import encode, evaluate, sample, train
from imagenet.data.image_files import ImageFiles
from imagenet.metrics.frechet import gaussian_statistics
from imagenet.metrics.inception import Features
from imagenet.weights import checkpoints, load_weights, read_provenance
from tests.imagenet.commands import ON_LATENTS, same, torchrun

pytest.importorskip("torch_fidelity")


def rows(images):
    """An extractor of known features: the mean of each channel and row."""
    x = images.double().mean(3).flatten(1) / 255
    return Features(x, x)


@pytest.mark.slow
def test_from_pictures_to_a_fine_tuned_model(pictures, vae, tmp_path):
    latents, run, drawn, scores, tuned = (
        str(tmp_path / name) for name in ("latents", "run", "drawn.npz", "scores.json", "tuned")
    )
    on_cpu = ["--device", "cpu"]

    # pictures become latents, which know their autoencoder from now on
    assert encode.main([str(pictures), "--out", latents, "--image-size", "16", "--vae", str(vae), *on_cpu]) == 0

    # two processes train, and are killed after their twelfth step; what they saved in its course is whole
    training = [*ON_LATENTS, "--data-path", latents, "--steps", "15", "--save-every", "5", "--out", run]
    killed = torchrun("-m", "tests.imagenet.interrupted", "SIGKILL", 12, *training)
    assert killed.returncode != 0
    newest = checkpoints(tmp_path / "run")[-1]
    assert newest.name in ("00000005", "00000010")
    assert sorted(path.name for path in newest.glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]

    # one process goes on to the end
    assert train.main([*training, "--resume"]) == 0
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert steps == [5, 10, 15]

    # pictures are drawn, by the autoencoder that the weights name
    assert sample.main([run, "--out", drawn, "--count", "20", "--steps", "2", *on_cpu]) == 0
    images = next(ImageFiles(tmp_path / "drawn.npz").batches(20))
    assert images.shape == (20, 3, 16, 16)

    # and measured, here against themselves: the model draws the same ones again
    mu, sigma = gaussian_statistics(rows(images).pool)
    np.savez(tmp_path / "reference.npz", mu=mu, sigma=sigma)
    measured = [run, "--reference", str(tmp_path / "reference.npz"), "--count", "20", "--steps", "1", "2", *on_cpu]
    assert evaluate.main([*measured, "--out", scores], extractor=rows) == 0
    figures = json.loads((tmp_path / "scores.json").read_text())["figures"]
    assert figures["2 NFE"]["fid"] < min(1e-9, figures["1 NFE"]["fid"])

    # another run starts from the weights, on the same latents
    further = [*ON_LATENTS, "--data-path", latents, "--init", run, "--steps", "2", "--out", tuned]
    assert train.main(further) == 0
    assert read_provenance(tuned) == read_provenance(run)
    assert not same(*(load_weights(folder)[0].state_dict() for folder in (run, tuned)))
