import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from imagenet.config import Config, build_model
from imagenet.data.image_files import ImageFiles, save_png
from imagenet.weights import save_weights

pytest.importorskip("torch_fidelity")
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from imagenet import sample
from imagenet.evaluate import main
from imagenet.metrics.fid import metrics_of
from imagenet.metrics.frechet import frechet_distance, gaussian_statistics, precision_recall
from imagenet.metrics.inception import Features
from imagenet.metrics.references import Reference

CONFIG = Config(hidden_size=16, depth=1, heads=2)


def linear(images: Tensor) -> Features:
    """An extractor of known features: means of parts of the image."""
    x = images.double() / 255
    channels, rows = x.mean((2, 3)), x.mean((1, 3))
    return Features(torch.cat([channels, rows], 1), 20 * channels)


def pictures(folder: Path, count: int, seed: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for i in range(count):
        save_png(folder / f"{i:03d}.png", rng.integers(0, 200 + 20 * seed, (8, 8, 3), dtype=np.uint8))
    return folder


def features(folder: Path) -> Features:
    return linear(torch.cat(list(ImageFiles(folder).batches(100))))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return pictures(tmp_path / "images", 40, 0)


@pytest.fixture
def real(tmp_path: Path) -> Path:
    return pictures(tmp_path / "real", 30, 1)


@pytest.mark.slow
def test_figures_of_known_features():
    """Gaussians of known distances, and an inception score near 5: labels are certain, and even over 5 classes.

    Each tenth, of n = 400, is even up to its draw, which costs a share (5 - 1) / (2 n) of the score.
    """
    n = 4000
    pool = torch.randn(n, 3, dtype=torch.float64)
    logits = 100.0 * torch.eye(5)[torch.arange(n) % 5]
    reference = Reference("r", gaussian_statistics(pool + 2))
    measured = metrics_of(Features(pool, logits), reference, Features(pool + 100, logits))
    assert measured["fid"] == pytest.approx(3 * 2**2)
    assert measured["inception_score"] == pytest.approx(5 * (1 - 4 / 800), abs=0.02)
    assert (measured["precision"], measured["recall"]) == (0, 0)


def test_fid_is_torch_fidelity_s():
    a, b = torch.randn(300, 20), 1.2 * torch.randn(200, 20) + 0.1
    theirs = fid_statistics_to_metric(fid_features_to_statistics(a), fid_features_to_statistics(b), False)
    measured = metrics_of(Features(a, a), Reference("b", gaussian_statistics(b)), None)
    assert measured["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-5)


def test_images_against_images_give_everything(images, real, tmp_path, capsys):
    out = tmp_path / "report.json"
    arguments = [str(images), "--reference", str(real), "--batch-size", "7", "--out", str(out)]
    assert main(arguments, extractor=linear) == 0
    report = json.loads(out.read_text())
    assert report["reference"] == {"name": "real", "images": 30}
    measured, f, r = report["figures"]["images"], features(images), features(real)
    assert measured["samples"] == 40
    assert measured["fid"] == pytest.approx(
        frechet_distance(*gaussian_statistics(f.pool), *gaussian_statistics(r.pool))
    )
    assert (measured["precision"], measured["recall"]) == pytest.approx(precision_recall(r.pool, f.pool), abs=1e-6)
    assert "against real, 30 images\npublished figures use 50,000 samples" in capsys.readouterr().out


def test_statistics_alone_give_fid_and_say_what_is_lacking(images, real, tmp_path, capsys):
    mu, sigma = gaussian_statistics(features(real).pool)
    np.savez(tmp_path / "statistics.npz", mu=mu, sigma=sigma)
    assert main([str(images), "--reference", str(tmp_path / "statistics.npz")], extractor=linear) == 0
    assert "against statistics.npz\nno precision and recall" in capsys.readouterr().out


@pytest.fixture
def model(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    network = build_model(CONFIG).network
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_weights(tmp_path / "model.safetensors", network.state_dict(), CONFIG)
    return tmp_path / "model.safetensors"


def test_a_model_is_measured_as_the_images_that_sample_draws(model, real, tmp_path):
    arguments = ["--reference", str(real), "--count", "20", "--device", "cpu", "--seed", "5"]
    out = tmp_path / "report.json"
    assert main([str(model), *arguments, "--steps", "1", "3", "--out", str(out)], extractor=linear) == 0
    measured = json.loads(out.read_text())["figures"]
    assert list(measured) == ["1 NFE", "3 NFE"]
    for steps in (1, 3):
        images = tmp_path / f"images{steps}"
        options = ["--count", "20", "--steps", str(steps), "--seed", "5", "--device", "cpu"]
        sample.main([str(model), "--out", str(images), *options])
        f, r = features(images), features(real)
        expected = frechet_distance(*gaussian_statistics(f.pool), *gaussian_statistics(r.pool))
        assert measured[f"{steps} NFE"]["fid"] == pytest.approx(expected)
