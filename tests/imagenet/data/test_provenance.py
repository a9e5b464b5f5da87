"""The description of its data stays with a model; latents of another autoencoder or normalisation are refused."""

import json
import shutil

import numpy as np
import pytest

from imagenet import train
from imagenet.data.latents import Latents
from imagenet.data.provenance import Provenance
from imagenet.data.vae import Normalisation
from imagenet.sampler import load_generator
from imagenet.weights import read_provenance
from tests.imagenet.commands import ON_LATENTS, command, status

KNOWN = Provenance("latents", "/somewhere", "a/name", Normalisation((0.0, 1.5), (1.0, 2.0)), ("a", "b"))


@pytest.mark.parametrize("known", [KNOWN, Provenance("digits"), Provenance("latents", "/somewhere")])
def test_it_survives_json(known):
    assert Provenance.from_json(known.to_json()) == known


@pytest.mark.parametrize("text", ["[]", '{"data": "latents", "colour": 1}', "[" * 100_000])
def test_what_is_no_provenance_is_refused(text):
    with pytest.raises(ValueError, match="no description of data") as error:
        Provenance.from_json(text)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("mine", "other", "same"),
    [
        ("stabilityai/sd-vae-ft-ema", "/models/sd-vae-ft-ema/", True),
        ("stabilityai/sd-vae-ft-ema", "stabilityai/sd-vae-ft-mse", False),
        (None, "stabilityai/sd-vae-ft-mse", True),
    ],
)
def test_an_autoencoder_is_known_by_the_last_part_of_its_name(mine, other, same):
    check = Provenance("latents", autoencoder=mine).check_latents
    if same:
        check(Provenance("latents", autoencoder=other), "here")
    else:
        with pytest.raises(ValueError, match="here: their autoencoder is"):
            check(Provenance("latents", autoencoder=other), "here")


def test_a_run_and_its_weights_name_path_autoencoder_and_normalisation(latents, latent_run, vae):
    about = read_provenance(latent_run)
    assert about == Provenance("latents", str(latents), str(vae), Latents(latents).normalisation, ("cat", "dog"))
    assert read_provenance(latent_run / "weights.safetensors") == about


def test_sampling_takes_the_autoencoder_that_the_weights_name_and_no_other(latents, latent_run, vae, tmp_path):
    """Once a model of 256 x 256 got Stable Diffusion's normalisation, whatever its latents were made by."""
    alone = tmp_path / "moved.safetensors"  # of a run, its weights say enough
    shutil.copy(latent_run / "weights.safetensors", alone)
    generator = load_generator(alone)
    assert generator.normalisation == Latents(latents).normalisation
    copy = load_generator(alone, vae=str(shutil.copytree(vae, tmp_path / "copy" / vae.name)))
    np.testing.assert_array_equal(generator.images([0, 1], 1), copy.images([0, 1], 1))
    with pytest.raises(ValueError, match=r"on other latents: their autoencoder is 'tiny', not 'other'"):
        load_generator(alone, vae=str(tmp_path / "other"))


def normalised_otherwise(latents, folder):
    other = shutil.copytree(latents, folder / "latents")
    index = json.loads((other / "latents.json").read_text())
    index["normalisation"]["std"][0] *= 2
    (other / "latents.json").write_text(json.dumps(index))
    return other


def test_other_latents_are_refused_by_resume_and_init(latents, latent_run, tmp_path, capsys):
    other = normalised_otherwise(latents, tmp_path)
    shutil.copytree(latent_run, tmp_path / "run")
    options = ["--data-path", other, "--steps", 2]
    assert status(command, tmp_path / "run", *options, "--resume", base=ON_LATENTS) == 2
    assert "run was trained on other latents than --data-path holds: their normalisation" in capsys.readouterr().err
    assert command(tmp_path / "run", "--data-path", latents, "--steps", 2, "--resume", base=ON_LATENTS) == 0
    assert status(command, tmp_path / "new", *options, "--init", latent_run, base=ON_LATENTS) == 2
    assert "was trained on other latents than --data-path holds: their normalisation" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_the_network_has_the_shape_of_the_latents(latents, latent_run):
    """The preset says 32 x 32 and 1000 classes; these latents are 8 x 8, of cats and dogs."""
    config = train.stored_config(latent_run, {})
    assert (config.in_channels, config.input_size, config.classes) == (4, 8, 2)
