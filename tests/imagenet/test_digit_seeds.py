"""The comparison over seeds: its plan, its sweep, and what becomes of trainings that fail."""

import json
import re
import subprocess
from dataclasses import replace

import pytest

from imagenet import digit_seeds, train
from imagenet.config import PRESETS, Config
from imagenet.metrics.digits import ACCEPTED, accepted
from tests.imagenet.commands import status
from tvm_ref import OBJECTIVES
from tvm_ref.cli import options as options_module


def test_bad_options_of_the_comparison(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for options in (["--seeds", "0"], ["--rates", "0"], ["--out", str(tmp_path)], ["--colour", "red"]):
        assert status(digit_seeds.main, options) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_words(tmp_path, capsys):
    assert status(digit_seeds.main, ["--out", str(tmp_path / "runs"), "--options", "--colour", "red"]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"runs/fm failed: train\.py: error: .*--colour", error)


def test_other_objectives_have_the_times_of_their_papers_and_none_is_guided():
    more = {key: ["--steps", "5"] for key in ("tvm", "meanflow", "lsd", "fm")}
    runs = digit_seeds.plan(more, {"lsd": 0.003}, 2)
    assert list(runs) == ["fm", *(f"{key}-seed{k}" for key in ("tvm", "meanflow", "lsd") for k in range(2))]
    for name, options in runs.items():
        changes = options_module.given(train.parser().parse_args(["digits", *options]), Config)
        config = replace(PRESETS["digits"], **changes)
        key = name.split("-")[0]
        assert (config.objective, config.steps) == (key, 5)
        assert config.seed == (0 if name == "fm" else int(name[-1]))
        assert config.sampler() == OBJECTIVES[key].default_times
        assert not config.guided
        assert config.lr == (0.003 if key == "lsd" else PRESETS["digits"].lr)


def test_equal_products_give_cheaper_steps_more_of_them():
    """In forwards a step of flow matching is three, one of TVM ten; of LSD's a quarter is TVM's without its three."""
    more = digit_seeds.equal_products(["tvm", "lsd"], ["--lr", "0.1", "--steps", "1000"])
    steps = {key: int(options[-1]) for key, options in more.items()}
    assert steps == {"tvm": 1000, "lsd": pytest.approx(2500, rel=0.03), "fm": pytest.approx(10_000 / 3, rel=0.03)}
    assert all(options[:2] == ["--lr", "0.1"] for options in more.values())


def test_the_rate_of_the_least_distance_is_chosen_and_a_diverged_one_never(tmp_path, monkeypatch):
    distances = {"tvm-lr0.01": 0.3, "tvm-lr0.1": 0.2, "lsd-lr0.01": 0.5}

    def judged(folder, options):
        assert options[options.index("--seed") + 1] == str(digit_seeds.SWEEP_SEED)
        if folder.name not in distances:
            return digit_seeds.DIVERGED
        return {"1": {"accuracy": 1.0, "frechet": distances[folder.name], "recall": 0.5}}

    monkeypatch.setattr(digit_seeds, "train_and_score", judged)
    more = {"tvm": [], "lsd": [], "fm": []}
    assert digit_seeds.best_rates(tmp_path, [0.01, 0.1], more, 2) == {"tvm": 0.1, "lsd": 0.01}
    assert set(json.loads((tmp_path / "sweep.json").read_text())) == {*distances, "lsd-lr0.1"}


def test_a_training_that_diverged_is_scored_as_the_worst(tmp_path, monkeypatch):
    said = "train.py: error: step 7: the jump loss is NaN or infinite on rank 0"
    monkeypatch.setattr(digit_seeds.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    assert digit_seeds.train_and_score(tmp_path / "seed0", []) == digit_seeds.DIVERGED
    assert not accepted(digit_seeds.DIVERGED["1"])


def test_the_table_has_medians_with_their_range():
    scores = [{"accuracy": 1.0, "frechet": 0.1 + 0.1 * k, "recall": 0.5} for k in range(3)]
    lines = digit_seeds.table({"tvm, NFE 1": scores, "class means": [scores[0] | {"recall": 0.0}]}).splitlines()
    assert "0.200 (0.100-0.300)" in lines[1]
    assert lines[1].endswith("passes")
    assert lines[2].endswith("fails")


@pytest.mark.slow
def test_the_comparison_trains_every_run_and_no_short_one_passes(tmp_path, capsys):
    out = tmp_path / "runs"
    assert digit_seeds.main(["--seeds", "2", "--jobs", "3", "--out", str(out), "--options", "--steps", "2"]) == 1
    assert {path.name for path in out.iterdir()} == {"tvm-seed0", "tvm-seed1", "fm", "results.json"}
    for name, objective, seed in (("tvm-seed0", "tvm", 0), ("tvm-seed1", "tvm", 1), ("fm", "fm", 0)):
        config = json.loads((out / name / "config.json").read_text())
        assert (config["objective"], config["seed"], config["steps"]) == (objective, seed, 2)
    lines = capsys.readouterr().out.splitlines()
    scores = [json.loads((out / f"tvm-seed{k}" / "metrics.json").read_text())["nfe"]["1"] for k in range(2)]
    (row,) = [line for line in lines if line.startswith("tvm, NFE 1")]
    for key in ACCEPTED:
        low, high = sorted(s[key] for s in scores)
        assert f"({low:.3f}-{high:.3f})" in row
    assert [line.split()[-1] for line in lines[1:3]] == ["passes", "fails"]  # held-out images, class means
    command = ["--seeds", "2", "--out", str(out), "--options", "--steps", "2"]
    assert status(digit_seeds.main, command) == 2  # finished
    assert "already holds a comparison" in capsys.readouterr().err
    (out / "results.json").unlink()
    (out / "tvm-seed1" / "metrics.json").unlink()
    assert digit_seeds.main(command) == 1  # interrupted
    assert capsys.readouterr().out.splitlines() == lines
