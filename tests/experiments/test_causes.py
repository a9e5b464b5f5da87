"""The oracle in place of a part of a method: exact cases, and what is written."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tvm_ref.experiments import causes, variants
from tvm_ref.experiments.causes import ExactPaths, OracleTraining
from tvm_ref.interpolant import interpolate
from tvm_ref.time_samplers import Times
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.data.mixture import GaussianMixture

SMALL = ToyConfig(objective="meanflow", batch_size=16, width=8, depth=1)


def test_lines_have_the_average_velocity_of_their_jumps():
    """For N(0, sigma^2 I) a path is x times the standard deviation at its time."""
    oracle = GaussianMixture(torch.zeros(1, 2), 0.5)
    paths = ExactPaths.of(oracle, paths=50, times=65)
    std = ((1 - paths.times) ** 2 * 0.5**2 + paths.times**2).sqrt()
    torch.testing.assert_close(paths.x, std[:, None, None] * paths.x[-1], rtol=1e-6, atol=1e-6)
    t, s = torch.rand(2, 50).sort(dim=0).values.flip(0)
    s[:10] = t[:10]
    x0, x1, times = paths.lines(Times(t, s, s), torch.arange(50), oracle)
    for asked, given in ((t, times.t), (s, times.s)):
        assert float((asked - given).abs().max()) < 1.1 * float(paths.times.diff().max())
    x, v = interpolate(x0, x1, times.t), x1 - x0
    moved = times.s < times.t
    landing = (x + (times.s - times.t)[:, None] * v)[moved]
    torch.testing.assert_close(landing, oracle.jump(x, times.t, times.s)[moved], rtol=1e-4, atol=1e-5)
    assert int((~moved).sum()) >= 10
    torch.testing.assert_close(v[~moved], oracle.velocity(x, times.t)[~moved], rtol=1e-4, atol=1e-4)


def test_the_exact_velocity_stands_for_v_at_the_same_points():
    oracle = make_distribution("moons")
    plain, exact = OracleTraining(SMALL, oracle).batch(0), OracleTraining(SMALL, oracle, "v").batch(0)
    x = interpolate(plain.x0, plain.x1, plain.times.t)
    torch.testing.assert_close(interpolate(exact.x0, exact.x1, exact.times.t), x)
    torch.testing.assert_close(exact.x1 - exact.x0, oracle.velocity(x, exact.times.t), rtol=1e-4, atol=1e-5)


def test_the_exact_target_stays_as_training_goes_on():
    oracle = make_distribution("moons")
    training = OracleTraining(ToyConfig(batch_size=16, width=8, depth=1), oracle, "target")
    training.train_step()
    assert training.target.module is oracle


def test_every_variant_costs_what_the_steps_of_tvm_do():
    names = [*causes.VARIANTS]
    made = causes.configs(ToyConfig(steps=100, batch_size=16, width=16, depth=2), names)
    assert made["TVM"].steps == made["TVM, exact u"].steps == 100
    assert made["LSD"].steps > 200
    assert made["network's floor"].steps > 300  # one forward and backward, no JVP


def test_a_seed_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    def make(name, config):
        training = OracleTraining(config, GaussianMixture(torch.zeros(1, 2), 0.5))
        if config.seed == 0:
            torch.nn.init.constant_(training.model.network.output.bias, torch.nan)
        return training

    options, report = SimpleNamespace(seeds=2, points=50), {"variants": {}}
    finished = list(variants.train({"MeanFlow": replace(SMALL, steps=2)}, make, options, report, tmp_path))
    assert [training.config.seed for _, training in finished] == [1]
    assert json.loads((tmp_path / "results.json").read_text()) == report
    assert [bool(run["figures"]) for run in report["variants"]["MeanFlow"]["runs"]] == [False, True]
    assert "-inf)" in variants.table(report)  # the end of the range


@pytest.mark.slow
def test_the_command_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    shown = {name: causes.VARIANTS[name] for name in ("network's floor", "TVM, exact u")} | {
        "FM": ({"objective": "fm"}, "")
    }
    monkeypatch.setattr(causes, "VARIANTS", shown)
    out = tmp_path / "out"
    options = ["--batch-size", "16", "--width", "8", "--depth", "2", "--points", "50", "--steps", "3", "--seeds", "2"]
    assert causes.main([*options, "--variants", *shown, "--out", str(out)]) == 0
    report = json.loads((out / "results.json").read_text())
    assert [len(row["runs"]) for row in report["variants"].values()] == [2, 2, 2]
    assert variants.table(report) in capsys.readouterr().out
