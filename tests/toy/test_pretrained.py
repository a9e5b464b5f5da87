"""The runs that come along: those that are described, and as good as is said."""

import hashlib
import json
import re

import pytest

from tvm_ref.toy.report.metrics import evaluate, make_reference
from tvm_ref.toy.run import METRICS, PRETRAINED, WEIGHTS, load_run

NAMES = sorted(path.name for path in PRETRAINED.glob("*/"))


def test_there_are_some():
    assert "moons" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_the_one_that_is_described_and_as_good(name):
    """By 300 of the 2,000 points that were measured."""
    checksum = hashlib.sha256((PRETRAINED / name / WEIGHTS).read_bytes()).hexdigest()
    described = (PRETRAINED / "README.md").read_text()
    assert re.search(rf"^\| `{name}` \| .* \| `{checksum}` \|$", described, re.MULTILINE)
    config, distribution, model = load_run(name)
    assert config.dist == name
    said = json.loads((PRETRAINED / name / METRICS).read_text())["nfe"]["1"]
    found = evaluate(model, make_reference(distribution, points=300), 1)
    assert found["paired_median"] == pytest.approx(said["paired_median"], rel=0.25)
    assert found["paired_rmse"] < 2 * said["paired_rmse"] < 0.3


def test_a_path_comes_before_a_name_and_another_name_is_told_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="moon cannot be read: nothing is there; models that come along: moons"):
        load_run("moon")
    (tmp_path / "moons").mkdir()
    with pytest.raises(ValueError, match="moons holds no run"):
        load_run("moons")
