"""The bound over training."""

import json

import pytest

from tests.commands import one_line
from tvm_ref.bound import other_bounds
from tvm_ref.bound.chain import TERMS
from tvm_ref.experiments import bound_over_training

SMALL = ["--width", "16", "--depth", "2", "--batch-size", "128"]


@pytest.mark.slow
def test_training_is_measured_and_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--dist", "moons", "eight_gaussians", "--points", "40", "--grid", "16", "--out", str(out), *SMALL]
    assert bound_over_training.main([*options, "--steps", "60"]) == 0
    report = json.loads((out / "training.json").read_text())
    assert list(report) == ["moons", "eight_gaussians"]
    for found in report.values():
        assert [r["step"] for r in found["records"]] == bound_over_training.measured_steps(60)
        assert all(record["violations"] == [] for record in found["records"])
        assert all(set(record) >= {*TERMS, *other_bounds.LABELS, "loss"} for record in found["records"])
        assert found["looked_at"] == 120
        assert all(r["exact_lipschitz"] < found["plane"]["length"] for r in found["records"])
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "theorem 1 multiplies" in capsys.readouterr().out
    assert "--overwrite" in one_line(capsys, bound_over_training.main, [*options, "--steps", "10"])
    assert bound_over_training.main([*options, "--steps", "10", "--overwrite"]) == 0


def test_training_that_diverges_is_reported(tmp_path, capsys, monkeypatch):
    def diverge(self):
        raise FloatingPointError("training diverged at step 0: the jump loss is NaN")

    monkeypatch.setattr(bound_over_training.Training, "train_step", diverge)
    with pytest.raises(SystemExit) as stop:
        bound_over_training.main(["--dist", "moons", "--points", "10", "--out", str(tmp_path / "out"), *SMALL])
    assert stop.value.code == 1
    assert "training diverged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dist", "suns"], "suns"),
        (["--lr", "-1"], "--lr"),
        (["--objective", "fm"], "flow matching"),
        (["--grid", "7"], "--grid"),
        (["--out", "full"], "holds something that is not such results"),
        (["--out", "file"], "is a file"),
    ],
)
def test_bad_input_gives_one_line(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert message in one_line(capsys, bound_over_training.main, options)
