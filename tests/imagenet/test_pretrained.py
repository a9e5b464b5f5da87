"""The weights that come along: those that are described, and as good as is said."""

import hashlib
import re

import pytest

from imagenet import load_generator, sample
from imagenet.metrics.digits import digit_metrics
from imagenet.weights import PRETRAINED, find_model
from tests.commands import one_line

DESCRIBED = (PRETRAINED / "README.md").read_text()
NAMES = sorted(path.stem for path in PRETRAINED.glob("*.safetensors"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_the_one_that_is_described(name):
    path = find_model(name)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    assert re.search(rf"^\| `{name}` \| .* \| `{checksum}` \|$", DESCRIBED, re.MULTILINE)
    generator = load_generator(name)
    side = generator.config.input_size
    assert generator.images(range(3), steps=1).shape == (3, side, side, 3)


def test_all_of_them_are_small():
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 6e6


def test_digits_are_as_good_as_is_said():
    """By one set of samples, the first of the eight whose mean is described."""
    metrics, said = digit_metrics(), DESCRIBED.split("```\ndigits\n")[1].split("\n")[0]
    found = metrics.measure(load_generator("digits", classes=metrics.labels.tolist()).samples(range(360), steps=1))
    assert found["accuracy"] >= 0.95
    for name, value in re.findall(r"(\w+) (0\.\d+)", said):
        assert found[name] == pytest.approx(float(value), abs=0.03), name


def test_a_path_comes_before_a_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sample.main(["digits", "--out", "a.png", "--count", "10"]) == 0
    (tmp_path / "digits").mkdir()
    capsys.readouterr()
    assert "digits holds no run" in one_line(capsys, sample.main, ["digits", "--out", "b.png"])
