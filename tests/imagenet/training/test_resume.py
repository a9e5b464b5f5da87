"""Runs that are stopped, killed, damaged or starved of space go on as if nothing had been."""

import os
import random
import signal
import time
from dataclasses import replace

import pytest

from imagenet import train
from imagenet.config import PRESETS
from imagenet.weights import checkpoints, load_weights
from tests.commands import one_line
from tests.imagenet import workers
from tests.imagenet.commands import (
    LIMIT,
    TINY,
    assert_same_run,
    command,
    ended,
    losses,
    same,
    state,
    stop_at,
    torchrun,
)  # fmt: skip
from tests.processes import started


def test_options_that_may_change_are_measured_against_the_run_s_own(tmp_path):
    """Without the preset's name a batch of 9 could not be resumed in 3 parts, which do not divide the digits' 128."""
    (tmp_path / "config.json").write_text(replace(PRESETS["digits"], batch_size=9, optimizer="adamw").to_json())
    options = train.Options(resume=True)
    (config, resumed, _), _ = train.make_plan(None, {"accumulate": 3}, tmp_path, options, 1)
    assert (config.batch_size, config.accumulate, config.optimizer, resumed) == (9, 3, "adamw", True)


@pytest.mark.slow
def test_a_line_of_the_log_is_a_mean_though_the_interval_changed(tmp_path, whole):
    """Resuming at step 52 with another interval once divided the sum of the wrong number of losses."""
    folder = tmp_path / "run"
    assert stop_at(52, folder, "--steps", 120) == 130
    assert command(folder, "--steps", 120, "--log-every", 20, "--resume") == 0
    coarse, fine = ({line[0]: line for line in losses(run)} for run in (folder, whole[0]))
    assert coarse[60][2] == pytest.approx((fine[55][2] + fine[60][2]) / 2, rel=1e-9)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.slow
def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(tmp_path, whole, capsys, stop):
    folder = tmp_path / "run"
    assert stop_at(52, folder, "--steps", 120, how=stop) == 130
    assert "stopped at step 52, and saved" in capsys.readouterr().out
    assert [p.name for p in checkpoints(folder)] == ["00000052"]
    assert not (folder / "weights.safetensors").exists()
    model, _ = load_weights(folder)  # of a run under way: those of the checkpoint
    assert any(p.any() for p in model.network.final_layer.parameters())

    assert train.main(["--out", str(folder), "--resume", "--log-every", "5"]) == 0  # its configuration is stored
    assert_same_run(folder, whole[0])


@pytest.mark.slow
def test_digits_go_on_bit_for_bit(tmp_path):
    """Their noise is quasi-random, drawn for many steps at once. SOAP's transposed matrices once became contiguous."""
    digits = ["digits", "--hidden-size", "16", "--depth", "1", "--batch-size", "8", "--log-every", "5"]
    assert command(tmp_path / "whole", "--steps", 40, base=digits) == 0
    assert stop_at(20, tmp_path / "run", "--steps", 40, base=digits) == 130
    assert command(tmp_path / "run", "--steps", 40, "--resume", base=digits) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_sigusr1_saves_and_training_goes_on(tmp_path, whole):
    """A scheduler sends it some minutes before it ends a job."""
    folder = tmp_path / "run"
    before = signal.getsignal(signal.SIGUSR1)
    assert stop_at(52, folder, "--steps", 120, how=signal.SIGUSR1) == 0
    assert [p.name for p in checkpoints(folder)] == ["00000052", "00000120"]
    assert same(*(state(a / "checkpoints" / "00000120") for a in (folder, whole[0])))
    assert signal.getsignal(signal.SIGUSR1) == before


def wait_for(process, condition):
    """Wait until a running process has brought about a condition."""
    patience = time.monotonic() + LIMIT
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < patience
        time.sleep(0.05)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.slow
def test_signals_to_the_whole_group_spare_the_processes_that_read_ahead(tmp_path, stop):
    """Slurm's SIGUSR1, a terminal's Ctrl-C and torchrun's SIGTERM go to them too; they once died of it, and all did."""
    folder = tmp_path / "run"
    options = ["--steps", "100000", "--save-every", "100000", "--workers", "2", "--out", folder]
    with started("imagenet/train.py", *TINY, *options) as process:
        wait_for(process, lambda: (folder / "train.jsonl").exists() and losses(folder))
        os.killpg(process.pid, signal.SIGUSR1)
        wait_for(process, lambda: checkpoints(folder))
        lines = len(losses(folder))
        wait_for(process, lambda: len(losses(folder)) > lines)
        os.killpg(process.pid, stop)
        out, error = process.communicate(timeout=LIMIT)
    assert process.returncode == 130, error[-2000:]
    assert "and saved" in out
    assert "Traceback" not in error
    assert len(checkpoints(folder)) == 2


@pytest.mark.slow
def test_ten_sigkills_at_random_moments_change_nothing(tmp_path, whole, forks):
    """In and out of checkpoint writing: every tenth step writes one, which takes a good part of the time."""
    reference, seconds = whole
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "120", "--save-every", "10", "--keep", "2", "--out", str(folder), "--resume"]
    chance = random.Random(0)
    reached = []
    for kill in range(10):
        process = forks.Process(target=workers.quiet, args=(arguments,))
        newest = checkpoints(folder)[-1:]
        process.start()
        # the first two are killed at any moment, the others once they have come further
        patience = time.monotonic() + LIMIT * (kill > 1)
        while process.is_alive() and checkpoints(folder)[-1:] == newest and time.monotonic() < patience:
            time.sleep(0.002)
        process.join(chance.uniform(0.0, 0.1 * seconds))
        process.kill()
        process.join()
        whole_ones = checkpoints(folder)
        reached.append(int(whole_ones[-1].name) if whole_ones else 0)
        for path in whole_ones:
            assert same(state(path), state(reference / "checkpoints" / path.name)), path
    assert reached == sorted(reached)
    assert reached[-1] > 0
    assert train.main(arguments) == 0
    assert_same_run(folder, reference)


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, whole, capsys):
    folder = tmp_path / "run"
    assert command(folder, "--steps", 120, "--save-every", 50, "--keep", 5) == 0
    path = folder / "checkpoints" / "00000120" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    (folder / "weights.safetensors").unlink()
    assert command(folder, "--steps", 120, "--resume") == 0
    out = capsys.readouterr().out
    assert "00000120 is damaged (__0_0.distcp has 1000 bytes of" in out
    assert "00000050 is damaged" not in out
    assert_same_run(folder, whole[0])


def test_no_whole_checkpoint_left(tmp_path, capsys):
    assert command(tmp_path / "run", "--steps", 3) == 0
    (tmp_path / "run" / "checkpoints" / "00000003" / "__0_0.distcp").write_bytes(b"")
    assert "can be read" in one_line(capsys, command, tmp_path / "run", "--steps", 3, "--resume")


@pytest.mark.slow
def test_a_full_disk_ends_with_a_clear_error_and_the_last_good_checkpoint(tmp_path, whole, forks, monkeypatch):
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "120", "--save-every", "60", "--out", str(folder)]
    assert stop_at(50, folder, "--steps", 120, "--save-every", 60) == 130
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    size = next(len(content) for path, content in before.items() if path.name == "__0_0.distcp")
    monkeypatch.chdir(tmp_path)
    process = forks.Process(target=workers.short_of_space, args=([*arguments, "--resume"], size // 2))
    process.start()
    assert ended(process) == 1
    error = (tmp_path / "stderr.txt").read_text()
    assert "the checkpoint of step 60 could not be written: File too large" in error
    assert "00000050 is complete" in error
    assert "the same command with --resume continues" in error
    assert {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()} == before
    assert train.main([*arguments, "--resume"]) == 0
    assert_same_run(folder, whole[0])


def test_resume_begins_where_there_is_nothing(tmp_path, capsys):
    assert command(tmp_path / "new", "--steps", 2, "--resume") == 0
    assert "holds no run to resume: starting one" in capsys.readouterr().out


@pytest.mark.slow
def test_torchrun_on_two_processes_equals_one_and_one_goes_on_where_two_stopped(tmp_path, whole):
    """Another number of processes goes on with the same global batches: losses agree to rounding."""
    folder = tmp_path / "run"
    options = [*TINY, "--steps", "120", "--save-every", "1000", "--out", str(folder)]
    done = torchrun("-m", "tests.imagenet.interrupted", "SIGTERM", 60, *options)
    assert "stopped at step 60, and saved" in done.stdout, done.stderr[-3000:]
    assert done.stdout.count("stopped at step") == 1  # one process speaks
    assert "Warning" not in done.stderr  # PyTorch 2.14 once told every process of an option that it has renamed
    assert train.main([*options, "--resume"]) == 0
    for a, b in zip(losses(folder), losses(whole[0]), strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)


@pytest.mark.slow
@workers.needs_fsdp
def test_fsdp_saves_samples_and_goes_on_as_one_plain_process(tmp_path, whole):
    folder = tmp_path / "run"
    options = ["--steps", 120, "--parallel", "fsdp", "--save-every", 20]
    assert stop_at(50, folder, *options) == 130
    assert len(list((folder / "samples").iterdir())) == 2
    assert command(folder, "--steps", 120, "--resume", "--parallel", "ddp") == 0
    for a, b in zip(losses(folder), losses(whole[0]), strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)
