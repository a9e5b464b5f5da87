"""What a model was trained on stays with it, and other data, autoencoders or normalisations are refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from imagenet import encode, sample, train
from imagenet.data.fingerprints import fingerprint
from imagenet.data.latents import Latents
from imagenet.data.provenance import Provenance
from imagenet.data.vae import Normalisation
from imagenet.sampler import load_generator
from imagenet.weights import read_provenance
from tests.imagenet.commands import ON_LATENTS, TINY, command, status

KNOWN = Provenance("latents", 3, "f00", "a/name", "ba5", Normalisation((0.0, 1.5), (1.0, 2.0)))


@pytest.mark.parametrize("known", [KNOWN, Provenance("digits", 7, "f00"), Provenance("latents")])
def test_it_survives_json(known):
    assert Provenance.from_json(known.to_json()) == known


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "5", "{}", '{"data": 5}', '{"data": "latents", "images": "3"}', '{"data": "latents", "colour": 1}',
        '{"data": "latents", "normalisation": 5}', '{"data": "latents", "normalisation": {"mean": [0], "std": [0]}}',
        '{"data": "latents", "normalisation": {"mean": ["a"], "std": [1]}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_provenance_is_refused(text):
    with pytest.raises(ValueError, match="no description of data") as error:
        Provenance.from_json(text)
    assert len(str(error.value)) < 200


def test_a_run_and_its_weights_name_data_autoencoder_and_normalisation(latents, latent_run, vae):
    data, about = Latents(latents), read_provenance(latent_run)
    assert about == Provenance(
        "latents", 12, data.fingerprint(), str(vae), data.autoencoder_fingerprint, data.normalisation
    )
    assert read_provenance(latent_run / "weights.safetensors") == about
    with safe_open(latent_run / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["data"])["autoencoder"] == str(vae)
    assert data.autoencoder_fingerprint == fingerprint(load_generator(latent_run).vae.state_dict())


def test_sampling_takes_the_autoencoder_that_the_weights_name_and_no_other(latents, latent_run, tmp_path, capsys):
    """Once a model of 256 x 256 got Stable Diffusion's normalisation, whatever its latents were made by."""
    from tests.autoencoders import tiny_vae

    alone = tmp_path / "moved.safetensors"  # of a run, weights alone say enough
    shutil.copy(latent_run / "weights.safetensors", alone)
    generator = load_generator(alone)
    assert generator.normalisation == Latents(latents).normalisation
    copy = load_generator(alone, vae=tiny_vae())  # by another name the same
    np.testing.assert_array_equal(generator.images([0, 1], 1), copy.images([0, 1], 1))
    with pytest.raises(ValueError, match="was trained on other latents: another autoencoder's fingerprint"):
        load_generator(alone, vae=tiny_vae(1))

    other = tmp_path / "latents"
    shutil.copytree(latents, other)
    index = json.loads((other / "latents.json").read_text())
    index["normalisation"]["std"][0] *= 2
    (other / "latents.json").write_text(json.dumps(index))
    drawn = [str(alone), "--out", str(tmp_path / "a.npz"), "--count", "2", "--device", "cpu"]
    assert status(sample.main, [*drawn, "--latents", str(other)]) == 2
    assert "another normalisation" in capsys.readouterr().err
    assert status(sample.main, [*drawn, "--latents", str(latents)]) == 0


def test_other_data_are_refused_by_resume_and_init(latents, latent_run, pictures, vae, tmp_path, capsys):
    other = tmp_path / "latents"
    options = ["--image-size", "16", "--vae", vae, "--shard-size", 5, "--device", "cpu", "--normalisation", "measured"]
    fewer = tmp_path / "pictures"
    shutil.copytree(pictures, fewer)
    (fewer / "cat" / "0.png").unlink()
    assert encode.main([str(a) for a in (fewer, "--out", other, *options)]) == 0
    shutil.copytree(latent_run, tmp_path / "run")
    assert status(command, tmp_path / "run", *ON_LATENTS, "--data-path", other, "--steps", 2, "--resume") == 2
    assert "was trained on other data than --data-path holds: another number of images, 11 in place of 12" in (
        capsys.readouterr().err
    )
    assert command(tmp_path / "run", *ON_LATENTS, "--data-path", latents, "--steps", 2, "--resume") == 0

    init = [*TINY, *ON_LATENTS, "--data-path", str(other), "--init", str(latent_run), "--out", str(tmp_path / "new")]
    assert status(train.main, init) == 2
    assert "was trained on other latents than --data-path holds: another normalisation" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
