import json
import os

import pytest
import torch

from imagenet import benchmark
from imagenet.benchmark import main, measure, measure_apart
from imagenet.config import PRESETS, Config, build_model
from tests.imagenet.commands import status

TINY = Config(data="synthetic", hidden_size=16, depth=1, heads=2, batch_size=4)


@pytest.mark.slow
def test_a_report_adds_up(tmp_path, capsys, monkeypatch):
    """Through the command and a process of its own; MFU is the least arithmetic over time over the device's rate."""
    monkeypatch.setitem(PRESETS, "digits", TINY)
    out = tmp_path / "cost.json"
    options = ["--batch-size", "4", "--steps", "2", "--warmup", "1", "--device", "cpu", "--out", str(out)]
    assert main(options) == 0
    report = json.loads(out.read_text())
    assert report["parameters"] == sum(p.numel() for p in build_model(TINY).parameters())
    flops, [row] = report["flops"]["false"], report["rows"]
    assert flops["ratio"] == flops["counted"] / flops["least"] <= 1.02
    assert row["images_per_second"] == pytest.approx(4 / row["step_seconds"])
    expected = row["images_per_second"] * flops["least"] / report["matmul_flops_per_second"]
    assert row["mfu"] == pytest.approx(expected)
    assert 0 < row["mfu"] < 1
    assert row["peak_bytes"] > 4 * 4 * report["parameters"]  # weights, two averages, gradients
    printed = capsys.readouterr().out
    assert f"{report['parameters'] / 1e6:.4g} M weights" in printed
    assert "1.000 of the least" in printed
    assert status(main, options) == 2
    assert "exists already; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_every_combination_is_a_row(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(
        benchmark, "measure_apart", lambda config, *_: seen.append(config) or measure(config, "cpu", 1, 0)
    )
    monkeypatch.setitem(PRESETS, "digits", TINY)
    assert main(["--batch-size", "2", "4", "--detach-jvp", "both", "--accumulate", "2", "--device", "cpu"]) == 0
    assert [(c.batch_size, c.detach_jvp) for c in seen] == [(2, False), (4, False), (2, True), (4, True)]
    assert all(c.accumulate == 2 and c.data == "synthetic" for c in seen)
    lines = capsys.readouterr().out.splitlines()
    assert "JVP detached: " in "\n".join(lines)
    assert len(lines) == 2 + 2 + 1 + 4


@pytest.mark.slow
def test_more_memory_than_there_is_fails_a_row_and_no_more(monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark, "Training", fail)
    monkeypatch.setattr(benchmark, "measure_apart", measure)
    assert main(["--device", "cpu"]) == 1
    assert "out of memory" in capsys.readouterr().out


class Dying:
    """Takes the process down that it arrives in, as the system does with one that needs too much memory."""

    batch_size, attention, detach_jvp = 1, "plain", False

    def __reduce__(self) -> tuple:
        return os._exit, (9,)


@pytest.mark.bad_shapes
@pytest.mark.slow
def test_a_process_that_is_killed_fails_a_row_and_no_more():
    assert "killed" in measure_apart(Dying(), "cpu", 1, 0).failure


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--batch-size", "3", "--accumulate", "2"], "--accumulate 2 does not divide"),
        (["--device", "abacus"], "cannot be used here"),
        (["imagenet"], "invalid choice"),
    ],
)
def test_bad_input_ends_with_one_line(options, message, capsys):
    assert status(main, options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
