"""The command: what a run leaves, what stays untouched, what is refused in one line, and signals."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.commands import one_line
from tvm_ref.sampling import sample
from tvm_ref.seeding import SAMPLING
from tvm_ref.toy import __main__ as command
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.points import units_of
from tvm_ref.toy.report import plots, report
from tvm_ref.toy.report.metrics import METRICS, NFES
from tvm_ref.toy.run import PICTURES, load_model, load_run, read_config
from tvm_ref.toy.training import Training

SMALL = ["--steps", "60", "--batch-size", "16", "--width", "8", "--depth", "2", "--points", "60"]
TABLE = np.random.default_rng(0).normal(size=(50, 2)) * [1, 30] + [1000, 0]


def run(folder: Path, *options: str) -> int:
    return command.main([*SMALL, "--out", str(folder), *options])


def again(folder: Path, *options: str) -> int:
    """The command on a run that is there, which knows its own options."""
    return command.main(["--out", str(folder), *options])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert run(folder) == 0
    return folder


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize(
    "options",
    [
        ["--dist", "checkerboard"],
        ["--objective", "fm"],
        ["--objective", "sct"],
        ["--objective", "lsd", "--settings", "stops=none", "learned_weight=true"],
        ["--conditional", "--w", "2", "--time-sampler", "trunc"],
    ],
    ids=lambda options: " ".join(options),
)
@pytest.mark.slow
def test_a_run_leaves_every_file_and_consistent_metrics(tmp_path, capsys, options):
    folder = tmp_path / "run"
    assert run(folder, *options) == 0
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "train.jsonl", "checkpoint.pt", "weights.safetensors", "metrics.json", "snapshots.safetensors",
        *PICTURES,
    }  # fmt: skip
    for picture in PICTURES:
        assert (folder / picture).read_bytes()[:4] == b"\x89PNG"
        assert (folder / picture).stat().st_size > 10_000
    metrics = json.loads((folder / "metrics.json").read_text())
    nfes = (*NFES, 64) if "fm" in options else (1,) if "sct" in options else NFES  # sct is for one step
    assert set(metrics["nfe"]) == {str(n) for n in nfes}
    for figures in metrics["nfe"].values():
        assert tuple(figures) == METRICS
        assert figures["paired_median"] > 0
        assert figures["w2_same_noise"] <= figures["paired_rmse"] * (1 + 1e-9)
        assert 0 <= figures["low_density"] <= 1
    assert metrics["seconds"]["training"] > 0
    assert metrics["steps"] == {"done": 60, "planned": 60}
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert state["step"] == 60
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # weights were once unreadable for others
    assert "paired RMSE" in capsys.readouterr().out


@pytest.mark.slow
def test_own_points_come_back_as_samples_in_their_own_units(tmp_path, capsys):
    data, folder = tmp_path / "points.csv", tmp_path / "run"
    points = TABLE.copy()
    points[3] = [1000, 1e5]
    np.savetxt(data, points, delimiter=";", header="height;weight", comments="")
    assert run(folder, "--data", str(data)) == 0
    said = capsys.readouterr().out
    assert "1 point lies far from the others, the farthest at (1000, 100000)" in said
    assert f"mean {points[:, 0].mean():.4f}".rstrip("0") in said
    stored = json.loads((folder / "data.json").read_text())
    assert stored["outliers"] == 1
    assert stored["standard_deviation"] == pytest.approx(points.std(0))
    assert "dist" not in json.loads((folder / "config.json").read_text())

    config, distribution, model = load_run(folder)
    restore = units_of(distribution).restore
    assert config.data == str(data)
    np.testing.assert_allclose(restore(distribution.centres), points, rtol=1e-12)
    lines = (folder / "samples.csv").read_text().splitlines()
    assert lines[0] == "height,weight"
    assert len(lines) == 1 + 60  # as many as errors are measured on

    written = np.loadtxt(lines[1:], delimiter=",")
    noise = torch.randn(60, 2, generator=torch.Generator().manual_seed(SAMPLING))
    np.testing.assert_allclose(written, restore(sample(model, noise)), rtol=1e-6)


@pytest.mark.slow
def test_a_run_keeps_its_own_points(tmp_path, capsys):
    """Later commands need no table, and use the points that were learned, whatever the table holds now."""
    data, folder = tmp_path / "points.csv", tmp_path / "run"
    points = TABLE.copy()
    np.savetxt(data, points, delimiter=";", header="height;weight", comments="")
    options = ["--data", str(data), "--columns", "height", "weight", "--drop-outliers"]
    assert run(folder, *options) == 0
    np.savetxt(data, points + [[1, 0]] * (np.arange(50) == 0)[:, None], delimiter=";")
    units = units_of(load_run(folder)[1])
    np.testing.assert_allclose(units.restore(load_run(folder)[1].centres), points, rtol=1e-12)
    assert units.columns == ("height", "weight")
    resume = [*options, "--resume", "--points", "70"]
    data.unlink()
    assert again(folder, *resume) == 0
    assert json.loads((folder / "metrics.json").read_text())["points"] == 70
    for damage in (lambda path: path.write_bytes(b"junk"), lambda path: np.save(path, points[:20])):
        damage(folder / "points.npy")
        with pytest.raises(ValueError, match=r"points\.npy"):
            load_run(folder)
    units = load_model(folder)[2]  # the model and its units are enough for samples
    np.testing.assert_allclose(units.mean, points.mean(0))


def test_default_folder_is_named_after_the_options():
    assert ToyConfig().name == "moons"
    assert ToyConfig(dist="circles", objective="fm").name == "circles-fm"
    assert ToyConfig(conditional=True, w=2.5).name == "moons-conditional-w2.5"
    assert ToyConfig(data="some/where/points.csv").name == "points"


@pytest.mark.slow
def test_a_run_is_never_overwritten_unasked(folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert "already holds a run: --resume, --overwrite, or another --out" in one_line(capsys, run, folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    for name in ("notes.txt", "bound.json"):  # the user's, and another command's
        (folder / name).write_text("mine")
    assert run(folder, "--overwrite", "--seed", "1") == 0
    assert "keeps what the earlier run did not write: bound.json, notes.txt" in capsys.readouterr().out
    assert read_config(folder).seed == 1
    assert (folder / "notes.txt").read_text() == "mine"


def full_of(**files):
    """Put files into a folder."""

    def prepare(folder):
        folder.mkdir()
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)

    return prepare


def nothing(folder):
    """No folder."""


PROJECT = full_of(config_json='{"my": "project"}', weights_safetensors="mine")
REFUSED = [  # what lies there, options, words of the one line
    (nothing, ["--dist", "moon"], "invalid choice: 'moon'"),
    (nothing, ["--colour", "red"], "unrecognized arguments"),
    (nothing, ["--steps", "0"], "--steps must be at least 1"),
    (nothing, ["--lr", "nan"], "--lr must be positive"),
    (nothing, ["--noise-share", "1.5"], "--noise-share must lie in"),
    (nothing, ["--noise-share", "0.6", "--equal-share", "0.6"], "nor exceed 1 together"),
    (nothing, ["--w", "2"], "--w needs --conditional"),
    (nothing, ["--conditional", "--dist", "checkerboard"], "--conditional needs classes"),
    (nothing, ["--conditional", "--data", "x.csv"], "--conditional needs classes"),
    (nothing, ["--data", "missing.csv"], "missing.csv"),
    (nothing, ["--data", "x.csv", "--dist", "moons"], "a run learns one of them"),
    (nothing, ["--bandwidth", "0.1"], "--bandwidth goes with --data"),
    (nothing, ["--columns", "1", "2"], "--columns goes with --data"),
    (nothing, ["--drop-outliers"], "--drop-outliers goes with --data"),
    (nothing, ["--points", "3"], "--points"),
    (nothing, ["--resume"], "holds no run"),
    (nothing, ["--resume", "--overwrite"], "not allowed with"),
    (nothing, ["--seed", "-1"], "--seed must lie in"),
    (lambda folder: folder.write_text("precious"), [], "is a file, not a folder"),
    (full_of(thesis_tex="precious"), ["--overwrite"], "holds something that is not a run"),
    (PROJECT, ["--resume"], "config.json is not a configuration of this program"),
    (full_of(config_json='{"format": 99}'), ["--resume"], "later version"),
    (full_of(config_json="{}"), ["--resume"], "no checkpoint to resume from"),
    (full_of(config_json="{}"), ["--resume", "--steps", "61"], "--resume keeps a run's options"),
    (full_of(config_json="{}", checkpoint_pt="text"), ["--resume"], "checkpoint.pt cannot be used"),
]


@pytest.mark.parametrize(("prepare", "options", "message"), REFUSED)
def test_what_cannot_be_done_is_said_in_one_line_and_changes_nothing(tmp_path, capsys, prepare, options, message):
    prepare(tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert message in one_line(capsys, again, tmp_path / "run", *options)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "run").exists() == (prepare is not nothing)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("checkpoint.pt", lambda path: path.write_bytes(path.read_bytes()[:5000])),
        ("checkpoint.pt", lambda path: torch.save([1, 2], path)),
        ("train.jsonl", lambda path: path.write_text('{"a": 1}\n')),
    ],
    ids=["cut short", "something else", "log"],
)
@pytest.mark.slow
def test_damaged_states_are_named_in_one_line(folder, capsys, name, damage):
    damage(folder / name)
    assert name in one_line(capsys, again, folder, "--resume")


@pytest.mark.parametrize(("module", "name"), [(torch, "save"), (plots, "save_figure")])
@pytest.mark.slow
def test_a_full_disk_loses_nothing_and_says_how_to_go_on(tmp_path, monkeypatch, module, name):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, name, full)
        with pytest.raises(OSError, match="No space left") as error:
            run(tmp_path)
    assert any("--resume" in note for note in error.value.__notes__)
    ways = ["--resume", "--points", "60"] if module is plots else ["--overwrite", *SMALL]  # drawn again, or anew
    assert again(tmp_path, *ways) == 0


def signal_at_step(monkeypatch, step, *signals):
    """Send signals to this process while a step of training is under way."""
    take = Training.train_step

    def interrupted(self):
        for sent in signals if self.step == step else ():
            signal.raise_signal(sent)
        return take(self)

    monkeypatch.setattr(Training, "train_step", interrupted)


@pytest.mark.slow
def test_interrupts_save_and_draw_and_resume_ends_as_if_nothing_had_been(tmp_path, finished, monkeypatch):
    for start, step, sent in ((run, 19, signal.SIGINT), (again, 37, signal.SIGTERM)):
        with monkeypatch.context() as patch:
            signal_at_step(patch, step, sent)
            assert start(tmp_path, *(["--resume", "--points", "60"] if start is again else [])) == 130
        assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == {"done": step + 1, "planned": 60}
        assert all((tmp_path / p).exists() for p in PICTURES)
    assert again(tmp_path, "--resume", "--points", "60") == 0
    assert (tmp_path / "weights.safetensors").read_bytes() == (finished / "weights.safetensors").read_bytes()


def test_a_second_ctrl_c_leaves_at_once(tmp_path, capsys, monkeypatch):
    signal_at_step(monkeypatch, 20, signal.SIGINT, signal.SIGINT)
    line = one_line(capsys, run, tmp_path, status=130)
    assert line.startswith("python -m tvm_ref.toy: stopped; the same command with --resume goes on from the last")
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.slow
def test_ctrl_c_in_measuring_leaves_at_once_and_resume_measures(tmp_path, capsys, monkeypatch):
    evaluate = report.evaluate

    def pressed(*arguments):
        signal.raise_signal(signal.SIGINT)
        return evaluate(*arguments)

    monkeypatch.setattr(report, "evaluate", pressed)
    line = one_line(capsys, run, tmp_path, status=130)
    assert line == "python -m tvm_ref.toy: stopped; the same command with --resume measures and draws\n"
    monkeypatch.setattr(report, "evaluate", evaluate)
    assert again(tmp_path, "--resume", "--points", "60") == 0
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"]["done"] == 60
    monkeypatch.setattr(report, "evaluate", pressed)  # and metrics of an earlier end do not stay
    one_line(capsys, again, tmp_path, "--resume", "--points", "70", status=130)
    assert not any((tmp_path / name).exists() for name in ("metrics.json", *PICTURES))
