"""Runs that start from given weights, runs that go on for longer, and what their log says of speed."""

import json
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from imagenet import train
from imagenet.config import Config, build_model
from imagenet.model.distributed import World
from imagenet.training import log as log_module
from imagenet.training.step import StepMetrics, Training
from imagenet.weights import read_config, save_weights
from tests.imagenet.commands import assert_same_run, command, same, status, stop_at
from tests.imagenet.workers import full_state, needs_fsdp, randomise

SIZES = {
    "data": "synthetic", "input_size": 32, "in_channels": 4, "classes": 1000, "patch_size": 16, "hidden_size": 16,
    "depth": 1,
}  # fmt: skip


@pytest.fixture
def given(tmp_path):
    """Weights of a model of flow matching, none of them zero."""
    path = tmp_path / "given.safetensors"
    config = Config(**SIZES, objective="fm", lr=0.5, seed=7)
    save_weights(path, randomise(build_model(config).network).state_dict(), config)
    return path


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_a_run_starts_from_given_weights(given, tmp_path, kind):
    """The model, and both averages; the configuration says so."""
    changes = SIZES | {"init": str(given), "optimizer": "adamw", "parallel": kind}
    options = train.Options(out=str(tmp_path / "run"))
    with train.distributed.process_group("cpu") as world:
        run, _ = train.begin("digits", changes, options, world)
        start = full_state(run.training.state_dict())
    expected = {f"network.{name}": a for name, a in load_file(given).items()}
    for model in (start["model"], start["target"]["module"], start["ema"]["module"]):
        assert same(dict(model), expected)
    assert start["step"] == 0
    assert read_config(tmp_path / "run").init == str(given)


@pytest.mark.slow
def test_a_run_from_given_weights_resumes_bit_for_bit_without_them(given, tmp_path):
    init = ["--steps", 12, "--init", given]
    assert command(tmp_path / "whole", *init) == 0
    assert stop_at(5, tmp_path / "run", *init) == 130
    given.unlink()  # the checkpoint holds all that is needed
    assert command(tmp_path / "run", *init, "--resume") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_of_a_constant_rate_goes_on_for_longer_bit_for_bit(tmp_path, capsys):
    """Equals a run that was asked for all steps at once; its first weights stay, under another name."""
    constant = ["--schedule", "constant", "--log-every", 3]
    assert command(tmp_path / "whole", "--steps", 12, *constant) == 0
    assert command(tmp_path / "run", "--steps", 6, *constant) == 0
    first = load_file(tmp_path / "run" / "weights.safetensors")
    assert status(command, tmp_path / "run", "--steps", 5, *constant, "--resume") == 2
    assert "can raise a run's --steps, not lower them" in capsys.readouterr().err
    assert command(tmp_path / "run", "--steps", 12, *constant, "--resume") == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert same(load_file(tmp_path / "run" / "weights-00000006.safetensors"), first)
    assert read_config(tmp_path / "run").steps == 12
    assert train.main(["--out", str(tmp_path / "run"), "--resume"]) == 0  # what is not said stays


def test_a_line_tells_the_speed_since_the_last_one_and_the_share_waited_for_data(tmp_path, monkeypatch):
    """By a clock that data move by 3 s and steps by 1, then 1 and 4, then 0 and 400; saving between lines counts."""
    clock = [100.0]
    monkeypatch.setattr(log_module.time, "perf_counter", lambda: clock[0])
    training = object.__new__(Training)  # without a model
    training.config, training.world, training.step = Config(batch_size=10), World(), 0
    log = log_module.Log(tmp_path, training)
    pace = [(3, 1)] * 2 + [(1, 4)] * 2 + [(0, 400)] * 2

    def data():
        for wait, _ in pace:
            clock[0] += wait
            yield SimpleNamespace()

    log.open()
    for _ in log.timed(data()):
        clock[0] += pace[training.step][1]
        training.step += 1
        metrics = StepMetrics((1.0, 2.0), 0.5)
        log.note(metrics)
        if training.step % 2 == 0:
            log.write(metrics)
            clock[0] += 10
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["images_per_second"] for line in lines] == pytest.approx([20 / 8, 20 / 20, 20 / 810], rel=1e-3)
    assert [line["data_wait"] for line in lines] == [6 / 8, 2 / 20, 0]
    assert [line["seconds"] for line in lines] == [8, 28, 838]
