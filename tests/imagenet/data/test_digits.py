"""The judges of digits, their controls, and a short training that beats both."""

import json
import subprocess
from dataclasses import replace

import pytest
import torch

from imagenet import digit_seeds, train
from imagenet.config import PRESETS, Config, build_model
from imagenet.data import digits
from imagenet.data.digits import Judges, accepted, class_means, load_digits, pixels
from imagenet.sampler import Generator
from tvm_ref import OBJECTIVES
from tvm_ref.cli import options as options_module


@pytest.fixture(scope="module")
def judges():
    return Judges()


def test_the_split_is_fixed_whole_and_in_proportion():
    (x, y), (x_test, y_test) = load_digits()
    assert x.shape == (1437, 1, 8, 8)
    assert x_test.shape == (360, 1, 8, 8)
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    assert ((torch.bincount(y_test) - torch.bincount(y) / 4).abs() < 2).all()
    rows = torch.cat([x, x_test]).flatten(1)
    assert len(rows.unique(dim=0)) == 1797  # no image is in both parts, or twice in one


def test_pixels_undo_the_scaling():
    x = load_digits().train[0][:5]
    torch.testing.assert_close(torch.from_numpy(pixels(x)), (x.flatten(1) + 1) / 2)
    assert pixels(torch.full((1, 1, 8, 8), 3.0)).max() == 1


def test_held_out_images_pass_and_their_distance_is_the_floor(judges):
    figures = judges.judge(load_digits().test[0])
    assert figures["frechet"] == figures["frechet_held_out"] == pytest.approx(0.103, abs=0.001)
    assert figures["accuracy"] > 0.98
    assert figures["recall"] > 0.9
    assert accepted(figures)


def test_class_means_fail_though_they_are_accurate(judges):
    figures = judges.judge(class_means(judges.labels))
    assert figures["accuracy"] == 1
    assert figures["frechet"] == pytest.approx(1.75, abs=0.01)
    assert figures["recall"] == 0
    assert not accepted(figures)


def test_wrong_labels_fail_though_the_images_are_real(judges):
    assert not accepted(judges.judge(load_digits().test[0].roll(1, 0)))


def test_noise_and_blur_raise_the_distance(judges):
    x = load_digits().test[0]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    distances = [judges.judge(x + a * noise)["frechet"] for a in (0, 0.2, 0.5)]
    assert distances == sorted(distances)
    assert distances[2] > 0.4
    assert judges.judge(0.7 * x + 0.3 * class_means(judges.labels))["frechet"] > distances[0] + 0.05


def test_scores_of_a_model_are_means_over_sets_of_other_noise(judges):
    config = Config(hidden_size=16, depth=1)
    torch.manual_seed(0)
    generator = Generator(build_model(config), config, classes=judges.labels.tolist())
    sets = generator.samples(range(digits.SETS * digits.TEST), 1).split(digits.TEST)
    assert not torch.equal(sets[0], sets[1])
    scores = [judges.judge(x) for x in sets]
    for name, value in digits.judge_model(generator, [1])[1].items():
        assert value == pytest.approx(sum(s[name] for s in scores) / digits.SETS, abs=1e-4)


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
def test_a_short_training_generates_in_one_step_what_flow_matching_cannot(trained, judges):
    tvm, fm = trained["tvm"]["1"], trained["fm"]["1"]
    means = judges.judge(class_means(judges.labels))
    assert tvm["accuracy"] > 0.95
    assert tvm["frechet"] < 0.5 * min(fm["frechet"], means["frechet"])
    assert tvm["recall"] > max(fm["recall"], means["recall"]) + 0.2
    assert not accepted(fm)


def test_bad_options_of_the_comparison(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    for options in (["--seeds", "0"], ["--steps", "0"], ["--out", str(tmp_path)], ["--colour", "red"]):
        with pytest.raises(SystemExit) as stop:
            digit_seeds.main(options)
        assert stop.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
def test_a_run_that_fails_is_named_with_its_last_words(tmp_path):
    with pytest.raises(RuntimeError, match=r"seed0 failed: train\.py: error: .*--colour"):
        digit_seeds.train_and_judge(tmp_path / "seed0", ["--colour", "red"])


def test_other_objectives_have_the_times_of_their_papers_and_none_is_guided():
    runs = digit_seeds.plan(["tvm", "meanflow", "lsd"], {"lsd": 0.003}, 2, ["--steps", "5"])
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


def test_the_rate_of_the_least_distance_is_chosen_and_a_diverged_one_never(tmp_path, monkeypatch):
    distances = {"tvm-lr0.01": 0.3, "tvm-lr0.1": 0.2, "lsd-lr0.01": 0.5}

    def judged(folder, options):
        assert options[options.index("--seed") + 1] == str(digit_seeds.SWEEP_SEED)
        if folder.name not in distances:
            return digit_seeds.DIVERGED
        return {"1": {"accuracy": 1.0, "frechet": distances[folder.name], "recall": 0.5}}

    monkeypatch.setattr(digit_seeds, "train_and_judge", judged)
    assert digit_seeds.sweep(tmp_path, ["tvm", "lsd"], [0.01, 0.1], [], 2) == {"tvm": 0.1, "lsd": 0.01}
    assert set(json.loads((tmp_path / "sweep.json").read_text())) == {*distances, "lsd-lr0.1"}
    assert digit_seeds.sweep(tmp_path, ["tvm", "lsd"], [], [], 2) == {}


def test_a_training_that_diverged_is_scored_as_the_worst(tmp_path, monkeypatch):
    said = "train.py: error: step 7: the jump loss is NaN or infinite on rank 0"
    monkeypatch.setattr(digit_seeds.subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 1, "", said))
    assert digit_seeds.train_and_judge(tmp_path / "seed0", []) == digit_seeds.DIVERGED
    assert not accepted(digit_seeds.DIVERGED["1"])


def test_the_table_has_medians_with_their_range():
    def scored(frechet):
        return {nfe: {"accuracy": 1.0, "frechet": frechet, "recall": 0.5} for nfe in ("1", "4")}

    runs = {"fm": scored(2.0)} | {f"tvm-seed{k}": scored(0.1 + 0.1 * k) for k in range(3)}
    runs |= {f"imf-seed{k}": scored(0.7 + 0.1 * k) for k in range(3)}
    text, fine = digit_seeds.table(runs, scored(0.1)["1"], scored(3.0)["1"])
    assert fine
    rows = {line[:30].strip(): line for line in text.splitlines()}
    assert "0.200 (0.100-0.300)" in rows["tvm, NFE 1"]
    assert rows["tvm, NFE 4"].endswith("passes")
    assert "0.800 (0.700-0.900)" in rows["imf, NFE 1"]
    assert rows["imf, NFE 1"].endswith("fails")


@pytest.mark.slow
def test_the_comparison_trains_every_run_and_no_short_one_passes(tmp_path, capsys):
    out = tmp_path / "runs"
    assert digit_seeds.main(["--seeds", "2", "--jobs", "3", "--steps", "2", "--out", str(out)]) == 1
    assert {path.name for path in out.iterdir()} == {"tvm-seed0", "tvm-seed1", "fm", "results.json"}
    for name, objective, seed in (("tvm-seed0", "tvm", 0), ("tvm-seed1", "tvm", 1), ("fm", "fm", 0)):
        config = json.loads((out / name / "config.json").read_text())
        assert (config["objective"], config["seed"], config["steps"]) == (objective, seed, 2)
    lines = capsys.readouterr().out.splitlines()
    scores = json.loads((out / "tvm-seed1" / "metrics.json").read_text())["nfe"]["1"]
    (row,) = [line.split() for line in lines if "seed 1" in line]
    assert [float(cell) for cell in row[-4:-1]] == pytest.approx([scores[k] for k in digits.ACCEPTED], abs=6e-4)
    assert [line.split()[-1] for line in lines[1:3]] == ["passes", "fails"]  # held-out images, class means
