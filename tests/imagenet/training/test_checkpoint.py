"""Checkpoints at every moment that a crash could choose, damaged ones, and hostile ones."""

import ctypes
import errno
import json
import os
import pathlib
import pickle
import shutil
import threading
import time
from dataclasses import replace

import psutil
import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from imagenet.cost.memory import state_bytes
from imagenet.data.batches import Batches
from imagenet.data.image_sets import load_data
from imagenet.data.provenance import Provenance
from imagenet.model.distributed import World
from imagenet.training.checkpoint import Saver, load_newest, read_checkpoint
from imagenet.training.run import Run
from imagenet.training.state import _Unpickler, on_cpu, part_of_rank
from imagenet.training.step import Training
from imagenet.weights import checkpoints
from tests.imagenet.workers import SMALL


class Crash(BaseException):
    """The power goes."""


def save(run, step, keep=2, **options):
    saver = Saver(run, keep, **options)
    state = {"step": step, "a": torch.full((50,), float(step)), "b": [(0.5, None), {3: torch.ones(())}]}
    saver.save(state, step, lambda folder: (folder / "more.txt").write_text(f"{step}"))
    saver.wait()
    return run / "checkpoints" / f"{step:08d}"


def newest(run):
    return load_newest(run, on_cpu, World())


def crash_at(monkeypatch, moment):
    """Let the call number `moment` of what touches the disk be the last; returns how many calls there were."""
    count = [0]

    def counting(function):
        def wrapped(*args, **kwargs):
            count[0] += 1
            if count[0] == moment:
                raise Crash
            return function(*args, **kwargs)

        return wrapped

    monkeypatch.setattr(os, "fsync", counting(os.fsync))
    monkeypatch.setattr(torch, "save", counting(torch.save))
    monkeypatch.setattr(shutil, "rmtree", counting(shutil.rmtree))
    monkeypatch.setattr(pickle, "dump", counting(pickle.dump))
    for name in ("rename", "mkdir", "write_text"):
        monkeypatch.setattr(pathlib.Path, name, counting(getattr(pathlib.Path, name)))
    return count


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "training on"])
@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, capsys, again, asynchronous):
    """Every call that touches the disk is the last one once; what is found is whole, and saving goes on from there."""
    options = {"asynchronous": asynchronous}
    with monkeypatch.context() as patch:
        save(tmp_path / "count", 1, **options)
        save(tmp_path / "count", 2, **options)
        count = crash_at(patch, 0)
        save(tmp_path / "count", 2 if again else 3, **options)
    assert count[0] > 12
    for moment in range(1, count[0] + 1):
        run = tmp_path / str(moment)
        save(run, 1, **options)
        save(run, 2, **options)
        with monkeypatch.context() as patch:
            crash_at(patch, moment)
            with pytest.raises(Crash):
                save(run, 2 if again else 3, **options)
        path, state = checkpoints(run)[-1], newest(run)
        assert state["step"] == int(path.name) >= (1 if again else 2)
        assert (state["a"] == state["step"]).all()
        assert state["b"] == [[0.5, None], {3: torch.ones(())}]
        assert (path / "more.txt").read_text() == path.name.lstrip("0")
        save(run, 4)
        assert [p.name for p in sorted((run / "checkpoints").iterdir())][-1] == "00000004"
        assert not list((run / "checkpoints").glob("*.partial")) + list((run / "checkpoints").glob("*.old"))
    assert "damaged" not in capsys.readouterr().out


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """A checkpoint holds the state at the time of the request; another state waits for it."""
    on_disk, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (on_disk.wait(60), fsync(descriptor)))
    weights = torch.ones(5)
    with Saver(tmp_path, 3, asynchronous=True) as saver:
        saver.save({"a": weights}, 1)
        weights += 1
        assert newest(tmp_path) is None
        on_disk.set()
        saver.save({"a": weights}, 2)
        assert (read_checkpoint(tmp_path / "checkpoints" / "00000001")["a"] == 1).all()
    assert (newest(tmp_path)["a"] == 2).all()


def rise_of_memory(work):
    """How far the memory of this process rises, in bytes, while it does some work."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed cannot serve again
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is held now
    before = psutil.Process().memory_info().rss
    work()
    peak = pathlib.Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return 1024 * int(peak) - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc gives back what is freed")
@pytest.mark.parametrize("optimizer", ["adamw", "soap"])
def test_on_a_cpu_nothing_is_copied(tmp_path, optimizer):
    """The copy of DiT-XL/2's state, 13.6 GB, once ended its training."""
    config = replace(SMALL, hidden_size=256, depth=4, batch_size=2, optimizer=optimizer)
    training = Training(config, World())
    training.train_step(Batches(config, load_data(config))[0])
    run = Run(tmp_path, training, Provenance("synthetic"), 3)
    save(tmp_path, 0)  # imports what it needs
    assert rise_of_memory(run.save) < 0.1 * state_bytes(config)
    assert state_bytes(config) > 5e7


@pytest.mark.parametrize("asynchronous", [False, True], ids=["waiting", "training on"])
def test_a_full_disk_loses_nothing_older(tmp_path, monkeypatch, asynchronous):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail():
        saver.save({"a": torch.ones(5)}, 2)
        while not saver.failed:  # so that training stops, and does not meet it at the next save
            time.sleep(0.01)
        saver.wait()

    path = save(tmp_path, 1)
    saver = Saver(tmp_path, 2, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"of step 2 could not be written: No space left on device; .*1 is complete"):
            fail()
    assert list((tmp_path / "checkpoints").iterdir()) == [path]
    assert newest(tmp_path)["step"] == 1


def test_a_bug_while_saving_is_no_full_disk(tmp_path):
    with pytest.raises(RuntimeError, match="step 1 could not be written: Object of type Saver is not JSON") as error:
        Saver(tmp_path, 2).save({"a": torch.ones(5), "b": Saver(tmp_path, 2)}, 1)
    assert "in finish" in "".join(str(error.value.__cause__))  # the line that failed is shown


def test_processes_write_about_as_much_as_each_other():
    """Each tensor once, and by the same rule in each process."""
    tensors = {f"{i}": torch.empty(n) for i, n in enumerate((900, 500, 300, 200, 0, 100, 100))}
    parts = [part_of_rank(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    sizes = [sum(a.numel() for a in part.values()) for part in parts]
    assert (min(sizes), max(sizes)) == (600, 900)


def test_a_tensor_keeps_its_layout(tmp_path):
    """Products of a matrix that is stored by columns are rounded in another way than those of one stored by rows."""
    matrix = torch.arange(6.0).view(2, 3).T
    saver = Saver(tmp_path, 1)
    saver.save({"a": matrix}, 1)
    again = newest(tmp_path)["a"]
    assert torch.equal(again, matrix)
    assert again.stride() == matrix.stride()


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoints(tmp_path)] == ["00000005", "00000006", "00000007"]


def test_what_was_just_saved_is_kept_beside_later_ones_that_are_damaged(tmp_path):
    """It was deleted as older, after which no checkpoint could be read."""
    save(tmp_path, 5)
    for step in (10, 11):
        (save(tmp_path, step, keep=3) / "__0_0.distcp").write_bytes(b"")
    save(tmp_path, 6, keep=1)
    assert newest(tmp_path)["step"] == 6
    assert "00000005" not in [path.name for path in checkpoints(tmp_path)]


DAMAGES = [(name, how) for name in ("__0_0.distcp", ".metadata", "checkpoint.json") for how in ("truncated", "absent")]


@pytest.mark.parametrize(("name", "how"), [*DAMAGES, ("more.txt", "absent"), (".metadata", "corrupted")])
def test_a_damaged_state_is_named_and_the_one_before_it_used(tmp_path, capsys, name, how):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    if how == "absent":
        path.unlink()
    else:
        half = len(content) // 2
        path.write_bytes(content[:half] + (b"" if how == "truncated" else bytes(len(content) - half)))
    assert newest(tmp_path)["step"] == 1
    said = capsys.readouterr().out
    assert "00000002" in said
    assert said.count("\n") == 1


class Evil:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.system, (f"touch {self.folder}/ran",)


def allowed(path):
    with path.open("rb") as stream:
        return _Unpickler(stream).load()


@pytest.mark.parametrize("kind", ["metadata", "planner data", "bytes", "tensor"])
def test_a_state_is_never_unpickled_into_code(tmp_path, kind):
    """DCP alone would run each of them."""
    path = save(tmp_path, 1)
    metadata = allowed(path / ".metadata")
    (index,) = (i for i in metadata.storage_data if i.fqn == "a")
    if kind == "metadata":
        metadata = Evil(tmp_path)
    elif kind == "planner data":
        metadata.planner_data = Evil(tmp_path)
    else:
        torch.save({"step": Evil(tmp_path)}, path / "evil.distcp")
        place = metadata.storage_data[index]
        place.relative_path, place.offset, place.length = "evil.distcp", 0, (path / "evil.distcp").stat().st_size
        if kind == "bytes":
            metadata.state_dict_metadata["a"] = BytesStorageMetadata()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    summary = json.loads((path / "checkpoint.json").read_text())
    summary["files"] = {p.name: p.stat().st_size for p in path.iterdir() if p.name != "checkpoint.json"}
    (path / "checkpoint.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match="is damaged"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()
