"""Nearness in cases of known answers, and the command."""

import statistics

import pytest
import torch

from imagenet.config import Config, build_model
from imagenet.experiments import memory
from imagenet.weights import save_weights
from tests.commands import one_line

LEARNED, HELD_OUT = torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[0.0, 3.0], [10.0, 5.0]])


@pytest.mark.parametrize(
    ("samples", "nearest", "nearer", "first"),
    [
        (LEARNED, 0, 1, 1),  # copies
        (HELD_OUT, 3, 0.5, 1),  # as held-out images: (0, 3) is 3 from the learned, 10.2 from the other held-out one
        (torch.tensor([[0.0, 1.5]]), 1.5, 1, 0.5),  # halfway
        (torch.tensor([[0.0, 4.0]]), 4, 0.5, 0),  # the held-out images are 3 and 5 away
        (torch.tensor([[0.0, 9.0]]), 9, 0, 0),
    ],
)
def test_nearness_of_known_points(samples, nearest, nearer, first):
    found = memory.memory(samples, LEARNED, HELD_OUT)
    assert found == pytest.approx({"nearest": nearest, "nearer": nearer, "learned first": first})


@pytest.mark.parametrize("shrink", [1.0, 0.5])
def test_samples_that_favour_nobody_have_the_fraction_of_the_learned(shrink):
    """Also when they are blurred, which makes them nearer to all."""
    splits = torch.randn(100, 300, 8, generator=torch.Generator().manual_seed(0))
    found = [memory.memory(shrink * x[:100], x[100:250], x[250:]) for x in splits]
    first, nearer = (statistics.fmean(f[name] for f in found) for name in ("learned first", "nearer"))
    assert first == pytest.approx(0.75, abs=0.02)
    assert nearer == pytest.approx(0.5, abs=0.02) if shrink == 1 else nearer > 0.7


@pytest.mark.slow
def test_the_command_prints_controls_and_models(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "sets_of", lambda metrics: 1)
    config, path = Config(hidden_size=16, depth=1, heads=1, steps=7), tmp_path / "a.safetensors"
    save_weights(path, build_model(config).network.state_dict(), config)
    assert memory.main([str(path), "--steps", "1", "--out", str(tmp_path / "m.png")]) == 0
    _, held_out, learned, mean, model = capsys.readouterr().out.splitlines()
    assert held_out.split()[:3] == ["0.103", f"{float(held_out.split()[1]):.3f}", "0.500"]
    assert abs(float(held_out.split()[3]) - 1437 / 1797) < 0.03
    assert learned.split()[1:4] == ["0.000", "1.000", "1.000"]
    assert mean.split()[0] == "1.750"
    assert model.split()[:2] == ["7", "1"]
    assert (tmp_path / "m.png").stat().st_size


def test_bad_input(tmp_path, capsys):
    assert "--steps" in one_line(capsys, memory.main, [str(tmp_path), "--steps", "0"])
    assert ".png" in one_line(capsys, memory.main, [str(tmp_path), "--out", str(tmp_path / "m.jpg")])
