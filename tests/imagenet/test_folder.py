"""A training on a person's own pictures, from the folder to samples by name."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from imagenet import evaluate, sample
from imagenet.sampler import load_generator
from imagenet.weights import read_provenance
from tests.commands import one_line
from tests.imagenet.commands import assert_same_run, command, losses, status, stop_at, torchrun
from tests.imagenet.workers import needs_fsdp

SMALL = ["folder", "--input-size", "8", "--hidden-size", "16", "--depth", "1", "--heads", "2", "--batch-size", "8"]
SMALL += ["--log-every", "2", "--save-every", "1000", "--optimizer", "adamw", "--steps", "6"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """Forty small pictures of each of two classes, darker and brighter."""
    folder, rng = tmp_path_factory.mktemp("own") / "pictures", np.random.default_rng(0)
    for name, least in (("red things", 0), ("7", 128)):
        (folder / name).mkdir(parents=True)
        for i in range(40):
            Image.fromarray(rng.integers(least, least + 128, (12, 10, 3), dtype=np.uint8)).save(
                folder / name / f"{i}.png"
            )
    return folder


@pytest.fixture(scope="module")
def run(own, tmp_path_factory):
    """A run of six steps on them."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    assert command(folder, "--data-path", own, "--flip", base=SMALL) == 0
    return folder


def test_what_the_data_are_travels_with_the_weights(own, run):
    about = read_provenance(run / "weights.safetensors")
    assert (about.data, about.path, about.classes) == ("folder", str(own), ("7", "red things"))
    assert about.brightness == pytest.approx(0.5, abs=0.01)
    config = load_generator(run).config
    assert (config.in_channels, config.input_size, config.classes, config.flip) == (3, 8, 2, True)


def test_classes_are_sampled_by_name(run, tmp_path, capsys):
    generator = load_generator(run, classes=["red things", 0, "7", "1"])  # a name goes before a number
    assert generator.labels(range(4)) == [1, 0, 0, 1]
    out = tmp_path / "red.npz"
    assert sample.main([str(run), "--out", str(out), "--classes", "red things", "--count", "3", "--device", "cpu"]) == 0
    assert np.load(out)["arr_1"].tolist() == [1, 1, 1]
    assert "columns" not in capsys.readouterr().out
    grid = [str(run), "--out", str(tmp_path / "a.png"), "--device", "cpu"]
    assert sample.main(grid) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["columns: 7, red things"]
    arguments = [str(run), "--out", str(tmp_path / "b.npz"), "--classes", "blue", "--device", "cpu"]
    assert "classes must lie in 0 to 1 or be named: 7, red things; got blue" in one_line(capsys, sample.main, arguments)


def test_scores_are_those_that_evaluate_gives(run, tmp_path, capsys):
    out = tmp_path / "scores.json"
    newest = run / "checkpoints" / "00000006" / "weights.safetensors"
    assert evaluate.main([str(newest), "--steps", "1", "4", "--out", str(out), "--device", "cpu"]) == 0
    figures, metrics = json.loads(out.read_text())["figures"], json.loads((run / "metrics.json").read_text())["nfe"]
    for nfe in ("1", "4"):
        assert figures[f"{nfe} NFE"] == {"samples": 8, "sets": 8, **metrics[nfe]}
    assert "fid" not in capsys.readouterr().out.lower()
    shutil.copy(newest, tmp_path)  # away from the pictures
    assert "--reference is needed" in one_line(capsys, evaluate.main, [str(tmp_path / newest.name), "--device", "cpu"])


def test_it_goes_on_bit_for_bit_without_the_folder_and_starts_others(own, run, tmp_path):
    pictures = shutil.copytree(own, tmp_path / "pictures")
    options = ["--data-path", pictures, "--flip"]
    assert stop_at(3, tmp_path / "run", *options, base=SMALL) == 130
    shutil.rmtree(pictures)
    assert command(tmp_path / "run", *options, "--resume", base=SMALL) == 0
    assert_same_run(tmp_path / "run", run)
    assert read_provenance(tmp_path / "run").path == str(pictures)
    begun = ["--data-path", own, "--init", run, "--steps", 2, "--objective"]
    for objective in ("fm", "lsd"):
        assert command(tmp_path / objective, *begun, objective, base=SMALL) == 0


def test_a_flat_folder_of_another_size_is_learned_without_classes(own, tmp_path, capsys):
    options = ["--data-path", own / "7", "--input-size", 12, "--steps", 2]
    assert command(tmp_path / "run", *options, base=SMALL) == 0
    assert "40 pictures, 1 class, 0 skipped" in capsys.readouterr().out
    config = load_generator(tmp_path / "run").config
    assert (config.input_size, config.classes) == (12, 1)
    with Image.open(tmp_path / "run" / "samples-1.png") as grid:
        assert grid.width == grid.height  # not one column
    changed = [*options, "--resume", "--input-size", 8]
    assert status(command, tmp_path / "run", *changed, base=SMALL) == 2
    assert "has --input-size 12" in capsys.readouterr().err


def test_pictures_of_a_program_that_was_killed_while_it_read_are_in_nobodys_way(own, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures.bin").write_bytes(b"half")
    (tmp_path / "run" / "lock").write_text("process 1 on elsewhere")
    assert command(tmp_path / "run", "--data-path", own, "--steps", 1, base=SMALL) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_two_processes_see_what_one_sees(own, run, tmp_path, kind):
    out = tmp_path / "run"
    options = ["--data-path", own, "--flip", "--parallel", kind, "--out", out]
    done = torchrun("imagenet/train.py", *SMALL, *options)
    assert done.returncode == 0, done.stderr[-2000:]
    for a, b in zip(losses(out), losses(run), strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)
    assert (out / "metrics.json").exists()
