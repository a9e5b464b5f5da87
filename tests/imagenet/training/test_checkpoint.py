"""Checkpoints at every moment that a crash could choose, and weights that say what they need."""

import errno
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import threading
import time
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from imagenet.config import Config, build_model
from imagenet.training import checkpoint, sharded_state
from imagenet.training.checkpoint import Saver, find_checkpoint, load_weights, read_checkpoint, save_weights

CONFIG = Config(hidden_size=16, depth=1)


class Crash(BaseException):
    """The power goes."""


def save(folder, step, keep=2):
    saver = Saver(folder, keep)
    saver.save({"step": step, "a": torch.full((50,), float(step)), "b": [(0.5, None), {3: torch.ones(())}]}, step)
    saver.wait()
    return folder / f"{step:08d}"


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
    monkeypatch.setattr(json, "dumps", counting(json.dumps))
    for name in ("rename", "mkdir"):
        monkeypatch.setattr(pathlib.Path, name, counting(getattr(pathlib.Path, name)))
    return count


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "a step that is there"])
@pytest.mark.slow
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(tmp_path, monkeypatch, again):
    """Every call that touches the disk is the last one once; what is found is whole, and saving goes on from there."""
    with monkeypatch.context() as patch:
        save(tmp_path / "count", 1)
        save(tmp_path / "count", 2)
        count = crash_at(patch, 0)
        save(tmp_path / "count", 2 if again else 3)
    assert count[0] > 5
    for moment in range(1, count[0] + 1):
        folder = tmp_path / str(moment)
        save(folder, 1)
        save(folder, 2)
        with monkeypatch.context() as patch:
            crash_at(patch, moment)
            with pytest.raises(Crash):
                save(folder, 2 if again else 3)
        path, complaints = find_checkpoint(folder)
        assert complaints == []
        state = read_checkpoint(path)
        assert state["step"] == int(path.name) >= (1 if again else 2)
        assert (state["a"] == state["step"]).all()
        assert state["b"] == [[0.5, None], {3: torch.ones(())}]
        save(folder, 4)
        assert [p.name for p in sorted(folder.iterdir())][-1] == "00000004"
        assert not list(folder.glob("*.partial")) + list(folder.glob("*.old"))


def test_the_summary_is_that_of_the_file_though_it_is_not_read_again(tmp_path, monkeypatch):
    """The hash is computed while writing: a state of 13.6 GB was once read again for it."""
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256_of", lambda path: pytest.fail("read again"))
        path = save(tmp_path, 1)
    files = json.loads((path / "checkpoint.json").read_text())["files"]
    assert files.keys() == {p.name for p in path.iterdir()} - {"checkpoint.json"}
    for name, about in files.items():
        content = (path / name).read_bytes()
        assert about == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_training_goes_on_while_a_state_is_written(tmp_path, monkeypatch):
    """What is written is what there was when it was asked for; another state waits for it."""
    on_disk, fsync = threading.Event(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (on_disk.wait(60), fsync(descriptor)))
    weights = torch.ones(5)
    with Saver(tmp_path, 3) as saver:
        saver.save({"a": weights}, 1)
        weights += 1
        assert find_checkpoint(tmp_path) == (None, [])
        on_disk.set()
        saver.save({"a": weights}, 2)
        assert (read_checkpoint(tmp_path / "00000001")["a"] == 1).all()
    assert (read_checkpoint(tmp_path / "00000002")["a"] == 2).all()


def test_a_state_that_cannot_be_written_is_told_where_it_is_waited_for(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path, saver = save(tmp_path, 1), Saver(tmp_path, 2)
    with monkeypatch.context() as patch:
        patch.setattr(sharded_state._HashingStream, "write", full)
        saver.save({"a": torch.ones(5)}, 2)
        while not saver.failed:
            time.sleep(0.01)
    with pytest.raises(
        OSError, match=r"checkpoint of step 2 could not be written: No space left on device; .*1 is whole"
    ):
        saver.wait()
    assert list(tmp_path.iterdir()) == [path]


def test_processes_write_about_as_much_as_each_other():
    """Each tensor once, and by the same rule in each process."""
    tensors = {f"{i}": torch.empty(n) for i, n in enumerate((900, 500, 300, 200, 0, 100, 100))}
    parts = [sharded_state.part_of_rank(tensors, rank, 3) for rank in range(3)]
    assert sorted(name for part in parts for name in part) == sorted(tensors)
    sizes = [sum(a.numel() for a in part.values()) for part in parts]
    assert (min(sizes), max(sizes)) == (600, 900)


@pytest.mark.parametrize("name", ["00000002", "00000002.partial", "x.partial", "00000001.old"])
def test_a_file_in_the_way_stops_no_saving(tmp_path, name):
    """A file, or a link, where a folder belongs once made every later save fail."""
    save(tmp_path / "a", 1)
    (tmp_path / "a" / name).write_text("not ours")
    (tmp_path / "a" / "link.partial").symlink_to(tmp_path)
    assert find_checkpoint(tmp_path / "a")[0].name == "00000001"
    save(tmp_path / "a", 2)
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == ["00000001", "00000002"]
    assert read_checkpoint(find_checkpoint(tmp_path / "a")[0])["step"] == 2


def test_the_newest_are_kept(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep=3)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["00000005", "00000006", "00000007"]


def test_a_state_is_never_unpickled_into_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    path = save(tmp_path, 1)
    torch.save({"step": Evil()}, path / "__0_0.distcp")
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))  # where torch.distributed.checkpoint would look
    stored = json.loads((path / "state.json").read_text())
    stored["tensors"]["a"]["parts"][0][3:] = [0, (path / "__0_0.distcp").stat().st_size]
    (path / "state.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="cannot be read"):
        read_checkpoint(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("parts", [[[0], [50], "../../secret", 0, 4000]]),
        ("parts", [[[0], [50], "absent", 0, 4000]]),
        ("parts", [[[0], [50], "__0_0.distcp", 0, 100]]),
        ("parts", [[[0], [49], "__0_0.distcp", 0, 4000]]),
        ("parts", []),
        ("parts", 5),
        ("size", [10**15]),
        ("size", [-1]),
        ("dtype", "load"),
        ("dtype", 5),
    ],
)
def test_a_state_that_says_what_cannot_be_is_refused(tmp_path, name, value):
    path = save(tmp_path, 1)
    stored = json.loads((path / "state.json").read_text())
    stored["tensors"]["a"][name] = value
    (path / "state.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="00000001 cannot be read"):
        read_checkpoint(path)


def test_weights_come_back_with_their_configuration(tmp_path):
    model = build_model(CONFIG)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    save_weights(tmp_path / "w.safetensors", model.network.state_dict(), CONFIG, source="made here")
    again, config = load_weights(tmp_path / "w.safetensors")
    assert config == CONFIG
    assert not any(p.requires_grad for p in again.parameters())
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_weights_that_cannot_be_used(tmp_path):
    model = build_model(CONFIG)
    path = tmp_path / "w.safetensors"
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)
    path.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(path)
    save_file(model.network.state_dict(), path)
    with pytest.raises(ValueError, match="which configuration"):
        load_weights(path)
    save_weights(path, model.network.state_dict(), Config(hidden_size=32, depth=1))
    with pytest.raises(ValueError, match="does not fit"):
        load_weights(path)
    save_file(load_file(path), path, {"config": '{"colour": "red"}'})
    with pytest.raises(ValueError, match="not a configuration"):
        load_weights(path)
    with pytest.raises(ValueError, match=r"holds no run"):
        load_weights(tmp_path)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((64,), float("nan")), r"blocks.0.mlp.fc1.bias holds numbers that are not finite"),
        (torch.full((64,), float("inf")), r"blocks.0.mlp.fc1.bias holds numbers that are not finite"),
        (torch.ones(64, dtype=torch.int32), r"blocks.0.mlp.fc1.bias holds torch.int32, not floating-point numbers"),
        (torch.ones(64, dtype=torch.complex64), r"blocks.0.mlp.fc1.bias holds torch.complex64"),
        (torch.ones(65), r"blocks.0.mlp.fc1.bias is of shape \[65\], not \[64\]"),
        (None, r"blocks.0.mlp.fc1.bias is missing"),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, value, message):
    weights = build_model(CONFIG).network.state_dict()
    if value is None:
        del weights["blocks.0.mlp.fc1.bias"]
    else:
        weights["blocks.0.mlp.fc1.bias"] = value
    save_weights(tmp_path / "w.safetensors", weights, CONFIG)
    with pytest.raises(ValueError, match=f"does not fit its configuration: {message}"):
        load_weights(tmp_path / "w.safetensors")


def test_a_tensor_that_no_network_has_is_named_as_it_may_be_printed(tmp_path):
    weights = build_model(CONFIG).network.state_dict() | {"\x1b[2J": torch.ones(1)}
    save_weights(tmp_path / "w.safetensors", weights, CONFIG)
    with pytest.raises(ValueError, match=r"\\x1b\[2J is no tensor of this network"):
        load_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("change", [{"hidden_size": 65536, "depth": 30}, {"classes": 2**24}, {"input_size": 4096}])
def test_a_network_beyond_all_memory_is_refused_before_it_is_built(tmp_path, change):
    weights = build_model(CONFIG).network.state_dict()
    save_weights(tmp_path / "w.safetensors", weights, replace(CONFIG, **change))
    with pytest.raises(ValueError, match="does not fit its configuration"):
        load_weights(tmp_path / "w.safetensors")


def test_weights_are_not_replaced_by_half_a_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_weights(path, build_model(CONFIG).network.state_dict(), CONFIG)
    before = path.read_bytes()
    (tmp_path / "w.safetensors.partial").mkdir()  # nothing can be written there
    with pytest.raises(OSError, match="could not be written"):
        save_weights(path, build_model(CONFIG).network.state_dict(), CONFIG)
    assert path.read_bytes() == before
