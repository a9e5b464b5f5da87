"""The training command: its files, its errors, and runs that are stopped, killed, damaged or starved of space."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import checkpoints
import pytest
import torch
import train
import workers
from checkpoints import find_checkpoint
from data import Batches, load_data
from presets import PRESETS, Config
from run import Run
from safetensors.torch import load_file
from test_parallel import ROOT, torchrun

TINY = [
    "--data", "synthetic", "--patch-size", "4", "--hidden-size", "16", "--depth", "1", "--heads", "2",
    "--batch-size", "8", "--optimizer", "adamw", "--lr", "1e-3", "--warmup", "0",
    "--log-every", "5", "--sample-every", "1000",
]  # fmt: skip


@pytest.fixture(scope="module")
def forks():
    """Processes that start in a moment, as a server that has imported everything forks them."""
    context = multiprocessing.get_context("forkserver")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(str(ROOT / part) for part in ("", "imagenet", "tests/imagenet"))
    context.set_forkserver_preload(["train", "workers"])
    process = context.Process(target=workers.quiet, args=(["--help"],))
    process.start()
    process.join()
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def command(folder, *options):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train.main([*TINY, "--out", str(folder), *map(str, options)])
    finally:
        torch.set_num_threads(threads)


def weights(folder):
    return load_file(folder / "weights.safetensors")


def losses(folder):
    lines = map(json.loads, (folder / "train.jsonl").read_text().splitlines())
    return [
        (line["step"], line["flow_map"], line["flow_matching"], line["gradient_norm"], line["lr"]) for line in lines
    ]


def same(a, b):
    """Whether two states are equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def state(path):
    return {k: v for k, v in checkpoints.read_checkpoint(path).items() if k != "seconds"}


def assert_same_run(a, b):
    assert same(weights(a), weights(b))
    assert losses(a) == losses(b)
    newest = [checkpoints.checkpoints(folder / "checkpoints")[-1] for folder in (a, b)]
    assert newest[0].name == newest[1].name
    assert same(state(newest[0]), state(newest[1]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 120 steps that nothing disturbed, with every third step's checkpoint."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    begun = time.perf_counter()
    assert command(folder, "--steps", 120, "--save-every", 3, "--keep", 100) == 0
    return folder, time.perf_counter() - begun


def test_a_run_leaves_every_file(tmp_path, capsys):
    folder = tmp_path / "run"
    options = ["--steps", "6", "--batch-size", "16", "--hidden-size", "16", "--depth", "1", "--log-every", "2"]
    assert train.main([*options, "--sample-every", "3", "--save-every", "4", "--out", str(folder)]) == 0
    names = {p.name for p in folder.iterdir()} - {"tensorboard"}
    assert names == {
        "config.json", "train.jsonl", "samples", "checkpoints", "weights.safetensors", "samples-1.png",
        "samples-4.png", "metrics.json",
    }  # fmt: skip
    assert [p.name for p in sorted((folder / "samples").iterdir())] == ["00000003.png", "00000006.png"]
    assert [p.name for p in checkpoints.checkpoints(folder / "checkpoints")] == ["00000004", "00000006"]
    for picture in folder.rglob("*.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert set(metrics["nfe"]) == {"1", "4"}
    assert set(metrics["nfe"]["1"]) == {"accuracy", "frechet", "frechet_floor", "recall"}
    assert 0 < metrics["seconds"]["training"] < metrics["seconds"]["total"]
    assert metrics["steps"] == {"done": 6, "planned": 6}
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(line["images_per_second"] > 0 and line["gib"] > 0 for line in lines)
    out = capsys.readouterr().out
    assert "1 NFE: accuracy" in out
    assert str(folder) in out
    model, config = checkpoints.load_weights(folder)
    assert config == Config(steps=6, batch_size=16, hidden_size=16, depth=1)
    stored = checkpoints.read_checkpoint(folder / "checkpoints" / "00000006")["ema"]["module"]
    assert same({f"network.{k}": v for k, v in model.network.state_dict().items()}, stored)


def test_logged_losses_are_means_since_the_line_before(whole, tmp_path):
    assert command(tmp_path / "fine", "--steps", 120, "--log-every", 1, "--save-every", 120) == 0
    fine = losses(tmp_path / "fine")
    for i, line in enumerate(losses(whole[0])):
        for term in (1, 2):
            assert line[term] == pytest.approx(sum(row[term] for row in fine[5 * i : 5 * i + 5]) / 5, rel=1e-9)


def test_a_line_of_the_log_is_a_mean_though_the_interval_changed(tmp_path, whole, monkeypatch):
    """Resuming at step 53 with another interval once divided the sum of the wrong number of losses."""
    folder = tmp_path / "run"
    monkeypatch.setattr(Run, "note", _stopping_at(Run.note, 52))
    assert command(folder, "--steps", 120) == 130
    monkeypatch.undo()
    assert command(folder, "--steps", 120, "--log-every", 20, "--resume") == 0
    coarse, fine = ({line[0]: line for line in losses(run)} for run in (folder, whole[0]))
    assert coarse[60][2] == pytest.approx((fine[55][2] + fine[60][2]) / 2, rel=1e-9)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_saves_and_leaves_and_the_run_goes_on_bit_for_bit(tmp_path, whole, monkeypatch, capsys, stop):
    monkeypatch.setattr(Run, "note", _stopping_at(Run.note, 52, stop))
    folder = tmp_path / "run"
    assert command(folder, "--steps", 120) == 130
    monkeypatch.undo()
    assert "stopped at step 53, and saved" in capsys.readouterr().out
    assert [p.name for p in checkpoints.checkpoints(folder / "checkpoints")] == ["00000053"]
    assert not (folder / "weights.safetensors").exists()
    model, _ = checkpoints.load_weights(folder)  # of a run under way: those of the checkpoint
    assert any(p.any() for p in model.network.final_layer.parameters())

    assert train.main(["--out", str(folder), "--resume", "--log-every", "5"]) == 0  # its configuration is stored
    assert_same_run(folder, whole[0])


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_the_whole_group_spares_the_processes_that_read_ahead(tmp_path, stop):
    """A terminal's Ctrl-C and torchrun's SIGTERM go to them too; they once died of it, and the trainer with them."""
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "100000", "--workers", "2", "--out", str(folder)]
    process = subprocess.Popen(
        [sys.executable, ROOT / "imagenet" / "train.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not (folder / "train.jsonl").exists():
        time.sleep(0.05)
    time.sleep(1)
    os.killpg(process.pid, stop)
    out, error = process.communicate(timeout=60)
    assert process.returncode == 130, error[-2000:]
    assert "and saved" in out
    assert "Traceback" not in error
    assert find_checkpoint(folder / "checkpoints")[0] is not None


def test_ten_sigkills_at_random_moments_change_nothing(tmp_path, whole, forks):
    """In and out of checkpoint writing: every third step writes one, which takes a good part of the time."""
    reference, seconds = whole
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "120", "--save-every", "3", "--keep", "2", "--out", str(folder), "--resume"]
    chance = random.Random(0)
    reached = []
    for kill in range(10):
        process = forks.Process(target=workers.quiet, args=(arguments,))
        newest = checkpoints.checkpoints(folder / "checkpoints")[-1:]
        process.start()
        while kill > 1 and process.is_alive() and checkpoints.checkpoints(folder / "checkpoints")[-1:] == newest:
            time.sleep(0.002)  # the first two are killed at any moment, the others once they have come further
        process.join(chance.uniform(0.0, 0.1 * seconds))
        process.kill()
        process.join()
        whole_ones = checkpoints.checkpoints(folder / "checkpoints") if folder.exists() else []
        reached.append(int(whole_ones[-1].name) if whole_ones else 0)
        for path in whole_ones:
            assert find_checkpoint(folder / "checkpoints")[1] == []
            assert same(state(path), state(reference / "checkpoints" / path.name)), path
    assert reached == sorted(reached)
    assert reached[-1] > 0
    assert train.main(arguments) == 0
    assert_same_run(folder, reference)


@pytest.mark.parametrize("damage", ["truncated", "corrupted", "no summary", "no state"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, whole, capsys, damage):
    folder = tmp_path / "run"
    assert command(folder, "--steps", 120, "--save-every", 50, "--keep", 5) == 0
    newest = folder / "checkpoints" / "00000120"
    path = newest / "state.pt"
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "corrupted":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    else:
        (newest / "checkpoint.json" if damage == "no summary" else path).unlink()
    (folder / "weights.safetensors").unlink()
    assert command(folder, "--steps", 120, "--resume") == 0
    error = capsys.readouterr().err
    assert "00000120 is damaged" in error
    assert "going on from" in error
    assert "00000100" in error
    assert_same_run(folder, whole[0])


def test_no_whole_checkpoint_left(tmp_path, capsys):
    assert command(tmp_path / "run", "--steps", 3) == 0
    (tmp_path / "run" / "checkpoints" / "00000003" / "state.pt").write_bytes(b"")
    with pytest.raises(SystemExit) as stop:
        command(tmp_path / "run", "--steps", 3, "--resume")
    assert stop.value.code == 2
    assert "no other checkpoint is left" in capsys.readouterr().err


def test_a_full_disk_ends_with_a_clear_error_and_the_last_good_checkpoint(tmp_path, whole, forks, monkeypatch):
    folder = tmp_path / "run"
    arguments = [*TINY, "--steps", "120", "--save-every", "60", "--out", str(folder)]
    monkeypatch.setattr(Run, "note", _stopping_at(Run.note, 50))
    assert command(folder, "--steps", 120, "--save-every", 60) == 130
    monkeypatch.undo()
    before = {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()}
    size = next(len(content) for path, content in before.items() if path.name == "state.pt")
    monkeypatch.chdir(tmp_path)
    process = forks.Process(target=workers.short_of_space, args=([*arguments, "--resume"], size // 2))
    process.start()
    process.join()
    assert process.exitcode == 1
    error = (tmp_path / "stderr.txt").read_text()
    assert "the checkpoint of step 60 could not be written: File too large" in error
    assert "00000051 is whole" in error
    assert error.count("error: ") == 1
    assert {p: p.read_bytes() for p in (folder / "checkpoints").rglob("*") if p.is_file()} == before
    assert train.main([*arguments, "--resume"]) == 0
    assert_same_run(folder, whole[0])


def _stopping_at(note, step, how=signal.SIGTERM):
    def stopping(self, told, seconds):
        note(self, told, seconds)
        if self.training.step == step:
            signal.raise_signal(how)

    return stopping


def test_a_run_is_never_overwritten_and_keeps_its_options(tmp_path, capsys):
    folder = tmp_path / "run"
    assert command(folder, "--steps", 4) == 0
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for options, complaint in (
        (["--steps", "4"], "already holds a run: --resume, or another --out"),
        (["--steps", "5", "--resume"], "--resume keeps a run's options"),
    ):
        with pytest.raises(SystemExit) as stop:
            command(folder, *options)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert command(folder, "--steps", 4, "--resume", "--accumulate", "2") == 0  # how, not what: may change
    assert checkpoints.read_config(folder).accumulate == 2
    assert train.main(["--out", str(folder), "--resume"]) == 0  # what is not said stays
    assert checkpoints.read_config(folder).accumulate == 2
    with pytest.raises(SystemExit):
        train.main(["synthetic", "--out", str(folder), "--resume"])
    assert "has --input-size 8" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    (tmp_path / "file").write_text("")
    for name in ("full", "file"):
        with pytest.raises(SystemExit):
            command(tmp_path / name)


def test_resume_begins_where_there_is_nothing(tmp_path, capsys):
    assert command(tmp_path / "new", "--steps", 2, "--resume") == 0
    assert "holds no run to resume: beginning one" in capsys.readouterr().out


BAD = {
    "unknown preset": ["imagenet128"],
    "unknown option": ["--colour", "red"],
    "abbreviated option": ["--step", "3"],
    "text for a number": ["--steps", "many"],
    "no steps": ["--steps", "0"],
    "negative rate": ["--lr", "-1"],
    "NaN rate": ["--lr", "nan"],
    "share above 1": ["--noise-share", "1.5"],
    "heads that do not divide": ["--heads", "5"],
    "patches that do not tile": ["--patch-size", "3"],
    "guidance that is not positive": ["--w", "0"],
    "guidance upside down": ["--w", "2", "--w-max", "1"],
    "guidance without a null label": ["--label-dropout", "0"],
    "micro-batches that do not divide": ["--accumulate", "7"],
    "unknown objective": ["--objective", "gan"],
    "unknown attention": ["--attention", "linear"],
    "latents without a folder": ["imagenet256-w2", "--attention", "plain"],
    "latents that are not there": ["imagenet256-w2", "--attention", "plain", "--data-path", "nowhere"],
    "cifar10 that is not there": ["cifar10", "--attention", "plain", "--data-path", "nowhere"],
    "data of another shape": ["--input-size", "16"],
    "more classes than said": ["--classes", "9"],
    "device that is not there": ["--device", "cuda:99"],
    "device that does not exist": ["--device", "abacus"],
    "negative seed": ["--seed", "-1"],
    "no line of the log": ["--log-every", "0"],
    "SOAP on spread weights": ["--optimizer", "soap", "--parallel", "fsdp"],
    "what nobody has tried": ["--compile", "--parallel", "fsdp"],
    "detaching what is not there": ["--objective", "fm", "--detach-jvp"],
}


@pytest.mark.parametrize("options", BAD.values(), ids=BAD)
def test_bad_input_ends_with_one_line_and_status_2(tmp_path, capsys, options):
    with pytest.raises(SystemExit) as stop:
        train.main([*options, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "error: " in error
    assert not (tmp_path / "run").exists()


def test_help_shows_presets_and_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for name in PRESETS:
        assert name in text
    for name in Config.__dataclass_fields__:
        assert f"--{name.replace('_', '-')}" in text


def test_torchrun_on_two_processes_equals_one_and_one_goes_on_where_two_stopped(tmp_path, whole):
    """Another number of processes goes on with the same global batches: losses agree to rounding."""
    folder = tmp_path / "run"
    poison = tmp_path / "interrupted.py"
    poison.write_text(
        "import signal, sys\nfrom run import Run\nimport train\nfrom test_train import _stopping_at\n"
        "Run.note = _stopping_at(Run.note, 60)\nsys.exit(train.main())\n"
    )
    options = [*TINY, "--steps", "120", "--save-every", "1000", "--out", str(folder)]
    done = torchrun(poison, *options)
    assert "stopped at step 61, and saved" in done.stdout, done.stderr[-3000:]
    assert done.stdout.count("stopped at step") == 1  # one process speaks
    assert train.main([*options, "--resume"]) == 0
    for a, b in zip(losses(folder), losses(whole[0]), strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_batches_do_not_depend_on_the_number_of_processes(world):
    config = Config(batch_size=96, seed=5)
    data = load_data(config)
    one = Batches(config, data)
    for step in (0, 14, 15, 29, 400):  # 14 and 29 cross an epoch's end
        parts = [Batches(config, data, rank, world)[step] for rank in range(world)]
        expected = one[step]
        assert torch.equal(torch.cat([p.x0 for p in parts]), expected.x0)
        assert torch.equal(torch.cat([p.x1 for p in parts]), expected.x1)
        for i in range(3):
            assert torch.equal(torch.cat([p.times[i] for p in parts]), expected.times[i])
        for i in range(2):
            assert torch.equal(torch.cat([p.condition[i] for p in parts]), expected.condition[i])


def test_every_sample_is_visited_once_per_epoch_in_new_orders():
    config = Config(batch_size=1437 // 3, seed=5)
    data = load_data(config)
    batches = Batches(config, data)
    epochs = [torch.cat([batches[step].x0 for step in range(3 * e, 3 * e + 3)]).flatten(1) for e in range(2)]
    everything = data.x.flatten(1)
    for epoch in epochs:
        assert torch.equal(epoch.sort(0).values, everything.sort(0).values)
    assert not torch.equal(*epochs)


def test_label_dropout_and_noise_have_their_distribution():
    config = Config(batch_size=4096, w=2.0, w_max=4.0)
    batch = Batches(config, load_data(config))[3]
    null = batch.condition.label == 10
    assert float(null.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert (batch.condition.beta[null] == 1).all()
    beta = batch.condition.beta[~null]
    assert 0.25 <= beta.min() < 0.26
    assert 0.49 < beta.max() <= 0.5
    assert float(batch.x1.mean()) == pytest.approx(0, abs=0.01)
    assert float(batch.x1.std()) == pytest.approx(1, abs=0.01)
    assert len(batch.x1.flatten(1).unique(dim=0)) == 4096  # no two samples share their noise


def test_reading_ahead_gives_the_same_batches():
    from data import loader

    config = Config(batch_size=8, steps=6)
    batches = Batches(config, load_data(config))
    for a, b in zip(loader(batches, 2, 0), loader(batches, 2, 2), strict=True):
        assert torch.equal(a.x1, b.x1)
        assert torch.equal(a.x0, b.x0)
        assert torch.equal(a.condition.label, b.condition.label)


@pytest.mark.parametrize("objective", ["fm", "meanflow", "pid"])
def test_the_neighbours_train_too(tmp_path, objective):
    options = (
        ["--objective", objective, "--equal-share", "0.5"] if objective == "meanflow" else ["--objective", objective]
    )
    assert command(tmp_path / "run", "--steps", 4, "--log-every", 4, *options) == 0
    _, flow_map, flow_matching, *_ = losses(tmp_path / "run")[0]
    assert (flow_map == 0) == (objective == "fm")
    assert (flow_matching == 0) == (objective == "meanflow")


def test_fsdp_saves_samples_and_goes_on_as_one_plain_process(tmp_path, whole):
    folder = tmp_path / "run"
    options = ["--steps", 120, "--parallel", "fsdp", "--sample-every", 20]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "note", _stopping_at(Run.note, 50))
        assert command(folder, *options) == 130
    assert len(list((folder / "samples").iterdir())) == 2
    assert command(folder, "--steps", 120, "--resume", "--parallel", "ddp") == 0
    for a, b in zip(losses(folder), losses(whole[0]), strict=True):
        assert a[:3] == pytest.approx(b[:3], rel=1e-5)


def test_tensorboard_is_optional(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert command(tmp_path / "run", "--steps", 2) == 0
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_cifar10_as_torchvision_stores_it(monkeypatch, tmp_path):
    """torchvision gives images as [N, H, W, 3] bytes; training sees [3, H, W] in [-1, 1]."""
    datasets = pytest.importorskip("torchvision.datasets")
    pictures = torch.arange(2 * 32 * 32 * 3).view(2, 32, 32, 3).remainder(256).byte()

    class Stored:
        def __init__(self, root, train, download):
            assert (root, train, download) == (str(tmp_path), True, False)
            self.data, self.targets = pictures.numpy(), [3, 9]

    monkeypatch.setattr(datasets, "CIFAR10", Stored)
    data = load_data(PRESETS["cifar10"], tmp_path)
    assert data.shape == (3, 32, 32)
    x, labels = data.batch([1, 0], 0)
    assert labels.tolist() == [9, 3]
    assert float(x.min()) == -1
    assert float(x.max()) == 1
    upright = pictures.permute(0, 3, 1, 2)[[1, 0]].float() / 127.5 - 1
    for a, b in zip(x, upright, strict=True):
        assert torch.equal(a, b) or torch.equal(a, b.flip(-1))
