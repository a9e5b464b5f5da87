import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.commands import one_line
from tvm_ref.bound import __main__ as command
from tvm_ref.bound.chain import LINKS, TERMS, Bound
from tvm_ref.toy.__main__ import main as toy

KEYS = {"t", *TERMS, "quadrature_error"}
SMALL = ["--width", "16", "--depth", "2", "--batch-size", "128"]
SIZE = ["--points", "100", "--grid", "64"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "moons"
    assert toy(["--dist", "moons", "--steps", "400", "--points", "50", "--out", str(folder), *SMALL]) == 0
    return folder


def copied(run, tmp_path, name, content):
    """The run with a file changed: keys of its JSON, all of its text, or, for None, no such file."""
    folder = Path(shutil.copytree(run, tmp_path / "copy"))
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    return folder


@pytest.mark.slow
def test_a_finished_run_is_measured_written_and_drawn(run, capsys):
    """Bounds are within a factor of 4: in mean square, and path by path in the median, as its RMS has a heavy tail."""
    assert command.main([str(run), "--points", "400"]) == 0
    result = json.loads((run / "bound.json").read_text())
    assert set(result) >= KEYS
    for lower, upper in LINKS:
        assert result[lower] <= result[upper] + result["quadrature_error"] + 1e-9 * result[upper]
    assert result["violations"] == []
    assert result["t"] == 1
    assert result["displacement"] < result["mean_square"] <= 4 * result["displacement"]
    assert result["medians"]["pathwise_one_sided"] <= 4 * result["medians"]["displacement"]
    assert math.isfinite(result["global"])
    assert abs(result["global_from_loss"] - result["global"]) <= 4 * result["standard_error"]
    assert (run / "bound.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "estimate from below" in printed
    assert all(line in printed for line in ("W2 (optimal transport)", "global (theorem 1)"))


@pytest.mark.slow
def test_results_are_reproducible_and_depend_on_t(run, capsys):
    results = []
    for t in ("1", "1", "0.4"):
        assert command.main([str(run), *SIZE, "--time", t]) == 0
        results.append(json.loads((run / "bound.json").read_text()))
    assert results[0] == results[1]
    assert results[2]["t"] == 0.4
    assert results[2]["path_lipschitz"] < results[0]["path_lipschitz"]


@pytest.mark.slow
def test_several_runs_have_a_table_of_medians(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tvm_ref.cli.progress.LOG_INTERVAL", 0.0)  # the bar is shown at every call
    folders = [Path(shutil.copytree(run, tmp_path / "copy")), run]
    assert command.main([*map(str, folders), "--points", "20", "--grid", "8"]) == 0
    printed, progress = capsys.readouterr()
    assert printed.count("displacement (eq. 36-38)") == 3  # of each run, and of both
    assert " 324/324 " in progress  # all calls of the network
    reports = [json.loads((folder / "bound.json").read_text()) for folder in folders]
    assert reports[0] == reports[1]
    reports[1] = reports[0] | {"displacement": 3 * reports[0]["displacement"]}
    row = next(line for line in command.table_over_runs(reports).splitlines() if line.startswith("displacement"))
    least = reports[0]["displacement"]
    ratio = 2 * least / reports[0]["w2"]
    assert row.split()[3:] == [f"{2 * least:.4g}", f"({least:.4g}", "-", f"{3 * least:.4g})", f"{ratio:.4g}"]


@pytest.mark.slow
def test_a_violated_link_is_named_and_fails(run, capsys, monkeypatch):
    monkeypatch.setattr(Bound, "violations", lambda self: ["w2 2 > displacement 1"])
    assert command.main([str(run), *SIZE]) == 1
    assert f"violated: {run}: w2 2 > displacement 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run"),
        (["RUN", "--steps", "5"], "--steps"),
        (["RUN", "--time", "0"], r"\(0, 1\]"),
        (["RUN", "--time", "nan"], r"\(0, 1\]"),
        (["RUN", "--time", "soon"], "--time"),
        (["RUN", "--points", "3"], "--points"),
        (["RUN", "--points", "99999"], "--points"),
        (["RUN", "--grid", "7"], "--grid"),
        (["FILE"], "not a folder"),
        (["/nowhere"], "--dist NAME \\(or --data FILE\\) --out /nowhere"),
        (["/nowhere/pinwheel"], "train first: python -m tvm_ref.toy --dist pinwheel --out /nowhere/pinwheel"),
        (["EMPTY"], "no config.json"),
    ],
)
def test_bad_input_gives_one_line(run, arguments, message, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    places = {"RUN": run, "FILE": tmp_path / "file", "EMPTY": tmp_path / "empty"}
    error = one_line(capsys, command.main, [str(places.get(a, a)) for a in arguments])
    assert re.search(message, error)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"conditional": True, "w": 2.0}, "without classes"),
        ("config.json", {"objective": "fm"}, "flow matching"),
        ("config.json", {"steps": 500}, "step 400 of 500"),
        ("config.json", {"width": 8}, "damaged"),
        ("config.json", {"depht": 2}, "config.json"),
        ("config.json", "[", "configuration"),
        ("weights.safetensors", None, "no model"),
        ("weights.safetensors", "rubbish", "damaged"),
        ("metrics.json", None, "step 0 of 400"),
        ("metrics.json", "{}", "damaged"),
    ],
)
def test_unfinished_damaged_and_uncovered_runs_are_refused(run, name, content, message, tmp_path, capsys):
    assert message in one_line(capsys, command.main, [str(copied(run, tmp_path, name, content))])
