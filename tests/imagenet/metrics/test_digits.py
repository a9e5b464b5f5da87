"""The metrics of digits, their controls, and a short training that beats both."""

import json

import pytest
import torch

from imagenet import train
from imagenet.config import Config, build_model
from imagenet.data.digits import TEST, load_digits
from imagenet.metrics.digits import DigitMetrics, accepted, class_means, pixels
from imagenet.metrics.own import measure_model, sets_of
from imagenet.sampler import Generator


@pytest.fixture(scope="module")
def digits():
    return DigitMetrics()


def test_pixels_undo_the_scaling():
    x = load_digits().train[0][:5]
    torch.testing.assert_close(torch.from_numpy(pixels(x)), (x.flatten(1) + 1) / 2)
    assert pixels(torch.full((1, 1, 8, 8), 3.0)).max() == 1


def test_held_out_images_pass_and_their_distance_is_the_floor(digits):
    figures = digits.measure(load_digits().test[0])
    assert figures["frechet"] == figures["frechet_held_out"] == pytest.approx(0.103, abs=0.001)
    assert figures["accuracy"] > 0.98
    assert figures["recall"] > 0.9
    assert accepted(figures)


def test_class_means_fail_though_they_are_accurate(digits):
    figures = digits.measure(class_means(*load_digits().train, digits.labels))
    assert figures["accuracy"] == 1
    assert figures["frechet"] == pytest.approx(1.75, abs=0.01)
    assert figures["recall"] == 0
    assert not accepted(figures)


def test_wrong_labels_fail_though_the_images_are_real(digits):
    assert not accepted(digits.measure(load_digits().test[0].roll(1, 0)))


def test_noise_and_blur_raise_the_distance(digits):
    x = load_digits().test[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    distances = [digits.measure(x + a * noise)["frechet"] for a in (0, 0.2, 0.5)]
    assert distances == sorted(distances)
    assert distances[2] > 0.4
    blurred = 0.7 * x + 0.3 * class_means(*load_digits().train, digits.labels)
    assert digits.measure(blurred)["frechet"] > distances[0] + 0.05


def test_scores_of_a_model_are_means_over_sets_of_other_noise(digits):
    config = Config(hidden_size=16, depth=1)
    torch.manual_seed(0)
    generator = Generator(build_model(config), config, classes=digits.labels.tolist())
    assert sets_of(digits) == 8
    sets = generator.samples(range(8 * TEST), 1).split(TEST)
    assert not torch.equal(sets[0], sets[1])
    scores = [digits.measure(x) for x in sets]
    for name, value in measure_model(generator, [1], digits)[1].items():
        assert value == pytest.approx(sum(s[name] for s in scores) / 8, abs=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A quarter of the default's steps, of TVM and of flow matching."""
    folder, figures = tmp_path_factory.mktemp("digits"), {}
    for objective in ("tvm", "fm"):
        options = ["--steps", "250", "--objective", objective, "--out", str(folder / objective)]
        assert train.main(options) == 0
        figures[objective] = json.loads((folder / objective / "metrics.json").read_text())["nfe"]
    return figures


@pytest.mark.slow
def test_a_short_training_generates_in_one_step_what_flow_matching_cannot(trained, digits):
    tvm, fm = trained["tvm"]["1"], trained["fm"]["1"]
    means = digits.measure(class_means(*load_digits().train, digits.labels))
    assert tvm["accuracy"] > 0.95
    assert tvm["frechet"] < 0.5 * min(fm["frechet"], means["frechet"])
    assert tvm["recall"] > max(fm["recall"], means["recall"]) + 0.2
    assert not accepted(fm)
