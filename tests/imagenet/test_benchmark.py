"""What a step is said to cost."""

import re

import pytest

from imagenet import benchmark
from imagenet.benchmark import main
from imagenet.config import PRESETS, Config, build_model
from imagenet.cost.flops import least_step_flops

TINY = Config(hidden_size=16, depth=1, heads=2, batch_size=4)


@pytest.mark.parametrize("detached", [False, True])
def test_the_numbers_add_up(capsys, monkeypatch, detached):
    """MFU is the least arithmetic over time over the device's rate."""
    monkeypatch.setitem(PRESETS, "digits", TINY)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(benchmark, "step_seconds", lambda *_: [(0.1, 0.02), (0.2, 0.05), (0.5, 0.05)])
    options = ["--settings", "detach_jvp=true"] if detached else []
    assert main(["--batch-size", "8", "--device", "cpu", *options]) == 0
    printed = capsys.readouterr().out
    weights = sum(p.numel() for p in build_model(TINY).parameters())
    assert f"{weights / 1e6:.4g} M weights" in printed
    assert "1.000 of the least" in printed
    assert "as long as 5.0 forwards" in printed
    assert "200.0 ms per step, 40 images per second" in printed
    least = least_step_flops(TINY.network(), detach_jvp=detached, guided=False)
    assert float(re.search(r"MFU (.*)%", printed)[1]) == pytest.approx(100 * 40 * least / 1e9, abs=0.06)


@pytest.mark.slow
def test_steps_are_timed_as_training_takes_them(monkeypatch, capsys):
    monkeypatch.setitem(PRESETS, "digits", TINY)
    assert main(["--timed", "2", "--objective", "lsd", "--accumulate", "2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"[\d.]+ ms per step", printed)
    assert "of the least" not in printed
