"""The metrics of Fashion-MNIST, on a stand-in whose classes are easy to tell."""

import json

import pytest
import torch

from imagenet import sample, train
from imagenet.data.fashion import load_fashion
from imagenet.experiments import fashion
from imagenet.metrics.fashion import FashionMetrics
from tests.imagenet.fashion import write_fashion


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fashion")
    write_fashion(folder, 1000, 600)
    return folder


def test_real_pictures_pass_and_controls_fail_where_they_should(folder):
    metrics = FashionMetrics(folder)
    (x, y), (test, labels) = ((x / 127.5 - 1, labels) for x, labels in load_fashion(folder))
    assert metrics.accuracy > 0.95
    assert torch.equal(metrics.labels, labels)
    real = metrics.measure(test)
    assert real["accuracy"] == pytest.approx(metrics.accuracy, abs=1e-4)
    assert real["frechet"] == real["frechet_held_out"] == round(metrics.held_out, 4) > 0
    assert min(real["precision"], real["recall"]) > 0.7

    means = metrics.measure(torch.stack([x[y == k].mean(0) for k in range(10)])[labels])
    assert means["accuracy"] > 0.95
    assert means["recall"] < 0.1
    noise = metrics.measure(torch.randn_like(test))
    assert noise["accuracy"] < 0.3
    assert noise["precision"] < 0.1
    assert noise["frechet"] > 2 * real["frechet"]

    shuffled = metrics.measure(test.roll(1, 0))
    assert shuffled["accuracy"] < 0.3
    assert shuffled["frechet"] == pytest.approx(real["frechet"], rel=1e-3)  # it does not look at labels


@pytest.mark.slow
def test_a_run_is_measured_and_its_classes_have_names(folder, tmp_path, capsys):
    sizes = ["--hidden-size", "8", "--depth", "1", "--heads", "1", "--steps", "2", "--batch-size", "4"]
    run = tmp_path / "run"
    assert train.main(["fashion", "--data-path", str(folder), "--out", str(run), *sizes]) == 0
    assert json.loads((run / "metrics.json").read_text())["nfe"]["1"]["frechet"] > 0
    assert sample.main([str(run), "--out", str(tmp_path / "bag.png"), "--classes", "Bag"]) == 0
    picture = tmp_path / "compared.png"
    assert fashion.main([str(run), "--data-path", str(folder), "--steps", "1", "--out", str(picture)]) == 0
    table = capsys.readouterr().out
    assert "tvm, NFE 1" in table
    assert "class means" in table
    assert picture.stat().st_size > 10_000


def test_the_nearest_picture_to_one_in_noise_is_that_picture():
    x = torch.rand(50, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fashion.nearest(x[[7, 3]] + 0.1 * torch.randn(2, 1, 28, 28), x), x[[7, 3]])
