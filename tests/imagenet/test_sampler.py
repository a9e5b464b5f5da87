"""One sampler of a model, for training, sampling and evaluating alike."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet import evaluate, sample, train
from imagenet.config import Config, build_model
from imagenet.data.image_files import grid
from imagenet.sampler import Generator, load_generator, untrained_guidance
from tests.imagenet.commands import ON_LATENTS, command
from tests.imagenet.workers import randomise


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def run(request, tmp_path_factory):
    """A run whose seed and precision are not the defaults; on a CPU samples are float32 either way."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("generator") / "run"
    size = ["--steps", "4", "--batch-size", "8", "--hidden-size", "16", "--depth", "1", "--optimizer", "adamw"]
    options = ["--seed", "3", "--precision", request.param, "--save-every", "4", "--device", "cpu"]
    assert train.main([*size, *options, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("steps", [1, 4])
def test_a_run_s_grids_are_the_images_that_sample_draws(run, tmp_path, steps):
    """They once had noise of their own, so that no command could draw them again."""
    out = tmp_path / "samples.npz"
    assert sample.main([str(run), "--out", str(out), "--count", "80", "--steps", str(steps), "--device", "cpu"]) == 0
    with np.load(out) as stored:
        expected = grid(stored["arr_0"], 10)
        assert stored["arr_1"].tolist() == list(range(10)) * 8  # a class per column
    np.testing.assert_array_equal(np.array(Image.open(run / f"samples-{steps}.png")), expected)
    if steps == 1:  # the last grid drawn while training
        np.testing.assert_array_equal(np.array(Image.open(run / "samples" / "00000004.png")), expected)


def test_grids_of_a_run_on_latents_show_pictures(latent_run):
    """They once showed the latents' channels."""
    generator = load_generator(latent_run)
    assert generator.vae is not None
    np.testing.assert_array_equal(np.array(Image.open(latent_run / "samples-1.png")), generator.grid(1))


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


def test_a_run_s_scores_are_those_that_evaluate_gives(run, tmp_path):
    pytest.importorskip("torch_fidelity")
    out = tmp_path / "scores.json"
    assert evaluate.main([str(run), "--steps", "1", "4", "--out", str(out), "--device", "cpu"]) == 0
    scores = json.loads(out.read_text())["figures"]
    metrics = json.loads((run / "metrics.json").read_text())["nfe"]
    for nfe in ("1", "4"):
        assert scores[f"{nfe} NFE"] == {"samples": 360, "sets": 8, **metrics[nfe]}


def test_a_sample_is_a_function_of_its_number(run):
    generator = load_generator(run)
    together, apart = generator.samples([5, 0, 12], 2), generator.samples([12], 2)
    torch.testing.assert_close(together[2:], apart, rtol=1e-5, atol=1e-6)
    assert generator.labels([5, 0, 12]) == [5, 0, 2]
    other = load_generator(run, seed=1).samples([12], 2)
    assert (other - apart).abs().max() > 0.1


@pytest.mark.parametrize(
    ("w_max", "w", "warns"), [(None, 2.0, False), (None, 2.1, True), (3.0, 2.5, False), (3.0, 3.5, True)]
)
def test_untrained_guidance_is_named(w_max, w, warns):
    assert (untrained_guidance(Config(w=2.0, w_max=w_max), w) is not None) == warns


def test_the_readme_s_lines_from_weights_to_images(run, tmp_path, monkeypatch):
    """The README's lines as printed, where a run lies under the name that they load."""
    (tmp_path / "digits").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    readme = (Path(evaluate.__file__).parent / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(from imagenet import .*?)```", readme, re.DOTALL)
    assert sum(bool(line.strip()) for line in lines.splitlines()) == 3
    names: dict[str, Any] = {}
    exec(lines, names)
    assert names["images"].shape == (8, 8, 8, 3)
    expected = load_generator(run, classes=[3, 8]).images(range(8), 1)
    np.testing.assert_array_equal(names["images"], expected)
    np.testing.assert_array_equal(
        names["generator"].grid(), grid(load_generator(run, classes=[3, 8]).images(range(16), 1), 2)
    )


def test_of_many_classes_a_grid_shows_ten_evenly_spaced():
    generator = Generator(randomise(build_model(Config(hidden_size=16, depth=1))), Config(classes=1000))
    assert generator.with_columns().classes == [0, 111, 222, 333, 444, 555, 666, 777, 888, 999]
    assert generator.columns(64) == 10
