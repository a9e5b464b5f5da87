"""The training command: its files, its errors, its help."""

import json
from pathlib import Path

import pytest
import torch

from imagenet import train
from imagenet.config import OF_DATA, PRESETS, Config
from imagenet.model import dit
from imagenet.training.checkpoint import read_checkpoint
from imagenet.training.step import Training
from imagenet.weights import checkpoints, load_weights, read_config
from tests.commands import one_line
from tests.imagenet.commands import command, losses, same, status


@pytest.mark.slow
def test_a_run_leaves_every_file(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--steps", "6", "--batch-size", "16", "--hidden-size", "16", "--depth", "1", "--log-every", "4"]
    options += ["--save-every", "4"]
    assert train.main([*options, "--out", str(folder)]) == 0
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "data.json", "train.jsonl", "samples", "checkpoints", "weights.safetensors",
        "samples-1.png", "samples-4.png", "metrics.json",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["00000004.png"]
    saved = checkpoints(folder)
    assert [p.name for p in saved] == ["00000004", "00000006"]
    first, last = (load_weights(path / "weights.safetensors")[0].state_dict() for path in saved)
    model, config = load_weights(folder)
    assert same(last, model.state_dict())
    assert not same(first, last)
    assert same(read_checkpoint(saved[-1])["ema"]["module"], model.state_dict())
    assert config == Config(steps=6, batch_size=16, hidden_size=16, depth=1)
    for picture in folder.rglob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["nfe"]) == {"1", "4"}
    assert set(metrics["nfe"]["1"]) == {"accuracy", "frechet", "frechet_held_out", "recall"}
    assert 0 < metrics["seconds"]["training"] < metrics["seconds"]["total"]
    assert metrics["steps"] == {"done": 6, "planned": 6}
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 6]  # the last step, too
    assert all(line["images_per_second"] > 0 and line["gib"] > 0 and 0 <= line["data_wait"] < 1 for line in lines)
    out = capsys.readouterr().out
    assert "1 NFE: accuracy" in out
    assert str(folder) in out


@pytest.mark.slow
def test_a_run_that_failed_before_it_saved_makes_way_for_another(tmp_path, monkeypatch):
    """Its folder could once be entered by --resume alone, which keeps the learning rate that was its fault."""

    def failing(self, batch, **_):
        raise FloatingPointError("step 0: the gradient is NaN or infinite on rank 0")

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Training, "train_step", failing)
        assert status(command, folder, "--steps", 2) == 1
    (folder / "samples").mkdir(exist_ok=True)
    (folder / "samples" / "00000009.png").write_bytes(b"of the run that failed")
    assert command(folder, "--steps", 2, "--lr", "1e-4") == 0
    assert read_config(folder).lr == 1e-4
    assert not (folder / "samples" / "00000009.png").exists()
    assert status(command, folder, "--steps", 2) == 2  # now there is something to lose


@pytest.mark.parametrize("damage", ["no json\n", '{"step": "two"}\n', "[]\n", "\udcff\n", "[" * 10_000 + "\n"])
@pytest.mark.slow
def test_a_damaged_line_of_the_log_does_not_block_resuming(tmp_path, damage):
    folder = tmp_path / "run"
    assert command(folder, "--steps", 4, "--log-every", 1, "--schedule", "constant") == 0
    lines = (folder / "train.jsonl").read_text().splitlines(keepends=True)
    content = "".join([*lines[:2], damage, *lines[2:]]).encode(errors="surrogateescape")
    (folder / "train.jsonl").write_bytes(content)
    assert command(folder, "--steps", 5, "--log-every", 1, "--schedule", "constant", "--resume") == 0
    assert [line[0] for line in losses(folder)] == [1, 2, 3, 4, 5]


def test_a_bug_in_the_network_shows_its_file_and_line(tmp_path, monkeypatch):
    """Whoever edits dit.py once got one line without either."""
    monkeypatch.setattr(dit.MLP, "forward", lambda self, x: self.fc1(self.fc2(x)))  # the wrong way round
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as error:
        command(tmp_path / "run", "--steps", 2)
    assert Path(__file__) in [Path(entry.path) for entry in error.traceback]
    assert train.GO_ON in error.value.__notes__


def test_too_little_memory_keeps_its_traceback_and_gets_a_hint(tmp_path, monkeypatch):
    def full(self, batch, **_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Training, "train_step", full)
    with pytest.raises(torch.OutOfMemoryError) as error:
        command(tmp_path / "run", "--steps", 2)
    assert any("--accumulate" in note and "--checkpointing" in note for note in error.value.__notes__)


@pytest.mark.slow
def test_a_run_is_never_overwritten_and_keeps_its_options(tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, "--steps", 4) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for options, complaint in (
        (["--steps", "4"], "already holds a run: --resume, or another --out"),
        (["--steps", "5", "--resume"], "has --steps 4, as its --schedule cosine was shaped by them; --init "),
        (["--lr", "1", "--resume"], "--resume keeps a run's options"),
    ):
        assert complaint in one_line(capsys, command, folder, *options)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert command(folder, "--steps", 4, "--resume", "--accumulate", "2") == 0  # how, not what: may change
    assert read_config(folder).accumulate == 2
    assert train.main(["--out", str(folder), "--resume"]) == 0  # what is not said stays
    assert read_config(folder).accumulate == 2
    for preset in ("cifar10", "digits"):  # once the default preset went unchecked
        assert "has data synthetic" in one_line(capsys, train.main, [preset, "--out", str(folder), "--resume"])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(SystemExit):
            command(tmp_path / name)


def test_there_are_42_options():
    """Each one more is one more that everybody reads."""
    options = [a for a in train.parser()._actions if a.option_strings and a.dest != "help"]
    assert len(options) <= 42


def test_help_shows_presets_and_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in PRESETS:
        assert name in text
    for name in set(Config.__dataclass_fields__) - set(OF_DATA):
        assert f"--{name.replace('_', '-')}" in text
