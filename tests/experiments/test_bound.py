"""The bound over training, and int L of networks."""

import json
import math

import pytest
import torch
from torch import nn

from tvm_ref.bound.chain import TERMS
from tvm_ref.experiments import bound_over_training, lipschitz_of_networks
from tvm_ref.toy.config import ToyConfig
from tvm_ref.toy.data.distributions import make_distribution
from tvm_ref.toy.network import ToyNetwork

SMALL = ["--width", "16", "--depth", "2", "--batch-size", "128"]


def refusal(module, arguments, capsys) -> str:
    """The one line that bad input gives, on stderr, with exit status 2."""
    with pytest.raises(SystemExit) as stopped:
        module.main([str(a) for a in arguments])
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.slow
def test_training_is_measured_and_drawn(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--dist", "moons", "--points", "60", "--grid", "16", "--out", str(out), *SMALL]
    assert bound_over_training.main([*options, "--steps", "120"]) == 0
    result = json.loads((out / "training.json").read_text())
    steps = [record["step"] for record in result["records"]]
    assert steps == bound_over_training.measured_steps(120)
    assert steps[-1] == 120
    assert all(record["violations"] == [] for record in result["records"])
    assert all(set(record) >= {*TERMS, "loss", "training_loss", "path_lipschitz"} for record in result["records"])
    assert all(-1 <= value <= 1 for value in result["rank_correlation_with_w2"].values())
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "Spearman" in capsys.readouterr().out
    assert "--overwrite" in refusal(bound_over_training, [*options, "--steps", "10"], capsys)
    assert bound_over_training.main([*options, "--steps", "10", "--overwrite"]) == 0


def test_training_that_diverges_is_reported(tmp_path, capsys, monkeypatch):
    def diverge(self):
        raise FloatingPointError("training diverged at step 0: the jump loss is NaN")

    monkeypatch.setattr(bound_over_training.Training, "train_step", diverge)
    with pytest.raises(SystemExit) as stop:
        bound_over_training.main(["--dist", "moons", "--out", str(tmp_path / "out"), *SMALL])
    assert stop.value.code == 1
    assert "training diverged" in capsys.readouterr().err


@pytest.mark.slow
def test_lipschitz_table(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--dist", "moons", "--steps", "10", "--points", "30", "--grid", "16", "--out", str(out)]
    assert lipschitz_of_networks.main([*options, *SMALL]) == 0
    report = json.loads((out / "lipschitz.json").read_text())
    networks = report["networks"]
    assert report["exact_flow"]["path_lipschitz"] > networks["plain MLP"]["trained"]["path_lipschitz"]  # 10 steps
    assert list(networks) == list(lipschitz_of_networks.CONTROLS)
    assert all(figures["violations"] == [] for states in networks.values() for figures in states.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in lipschitz_of_networks.CONTROLS)
    assert "--overwrite" in refusal(lipschitz_of_networks, [*options, *SMALL], capsys)


def test_spectral_initialisation_and_rms_norm_do_what_they_say():
    network = lipschitz_of_networks.apply_control(
        ToyNetwork(width=16, depth=3), lipschitz_of_networks.Control(rms_norm=True, spectral=True)
    )
    for layer, norm in network.hidden:
        expected = min(1.0, math.sqrt(layer.out_features / layer.in_features))
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(expected, rel=1e-5)
        assert not layer.bias.any()
        x = 5 * torch.randn(10, 16)
        torch.testing.assert_close(norm(x).square().mean(1), torch.ones(10))
    plain = lipschitz_of_networks.apply_control(ToyNetwork(width=16), lipschitz_of_networks.CONTROLS["plain MLP"])
    assert all(isinstance(layer, nn.Linear) for layer in plain.hidden)


def test_controlled_networks_have_right_terminal_velocities():
    """A JVP passes through RMSNorm: against central differences."""
    model = lipschitz_of_networks.at_random(
        ToyConfig(width=16, depth=2), make_distribution("moons"), lipschitz_of_networks.CONTROLS["both"]
    ).double()
    x, t, s = torch.randn(20, 2).double(), torch.full((20,), 0.9).double(), torch.full((20,), 0.4).double()
    df_ds = model.displacement_and_terminal_velocity(x, t, s)[1]
    difference = (model.jump(x, t, s + 1e-5) - model.jump(x, t, s - 1e-5)) / 2e-5
    torch.testing.assert_close(df_ds, difference, rtol=1e-6, atol=1e-8)


def test_rank_correlation_sees_order_alone():
    names = [*bound_over_training.LOSSES, *TERMS]
    records = [dict.fromkeys(names, float(x)) | {"loss": math.exp(x), "global": -x} for x in range(5)]
    correlations = bound_over_training.rank_correlations(records)
    assert correlations["loss"] == pytest.approx(1)
    assert correlations["global"] == pytest.approx(-1)
    assert all(math.isnan(value) for value in bound_over_training.rank_correlations(records[:2]).values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dist", "suns"], "suns"),
        (["--lr", "-1"], "--lr"),
        (["--objective", "fm"], "flow matching"),
        (["--data", "none.csv"], "none.csv"),
        (["--grid", "7"], "--grid"),
        (["--out", "full"], "holds something that is not such results"),
        (["--out", "file"], "is a file"),
    ],
)
@pytest.mark.parametrize("module", [bound_over_training, lipschitz_of_networks])
def test_bad_input_gives_one_line(module, options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert message in refusal(module, options, capsys)
