"""Pickles are read as numbers and records of calls: nothing in them is executed, and none costs more than its size."""

import contextlib
import io
import os
import pickle
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imagenet.foreign.luma import read_released
from imagenet.foreign.restricted_pickle import Object, read_pickle, to_array
from tests.imagenet.foreign.hostile_pickles import READERS
from tvm_ref.cli.errors import UserError

pytestmark = pytest.mark.bad_shapes  # a check of types may look at all that a pickle asks for


def read_and_measure(read, path):
    """Call read(path): returns the seconds of computing and the most bytes that it held at once, and what it raised."""
    raised, started = None, time.process_time()
    try:
        read(path)
    except UserError as error:
        raised = error
    seconds = time.process_time() - started
    tracemalloc.start()
    with contextlib.suppress(UserError):
        read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak, raised


@pytest.mark.parametrize(("kind", "title"), [(kind, title) for kind, (cases, _) in READERS.items() for title in cases])
def test_a_hostile_pickle_is_refused_in_one_printable_line(tmp_path, kind, title):
    """Or read, where that costs nothing: none takes a second or 200 megabytes."""
    cases, read = READERS[kind]
    data, said = cases[title]
    path = tmp_path / "file.pkl"
    path.write_bytes(b"\x80\x02" + data + b".")
    seconds, peak, raised = read_and_measure(read, path)
    assert seconds < 1
    assert peak < 200e6
    assert (raised is None) == (said is None)
    if raised is not None:
        assert said in str(raised)
        assert str(raised).isprintable()
        assert len(str(raised)) < 300 + len(str(path))


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def tell(path: str) -> None:
    Path(path).write_text("executed")


def attacks(marker: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that try to make the file `marker`, and what their refusal must name."""
    nested, zipped = io.BytesIO(), io.BytesIO()
    torch.save(Calls(os.system, f"touch {marker}"), nested, _use_new_zipfile_serialization=False)
    torch.save(Calls(os.system, f"touch {marker}"), zipped)
    load = torch.storage._load_from_bytes

    def holding(part: object) -> bytes:
        module = nn.Linear(1, 1)
        object.__setattr__(module, "_parameters", {"weight": part})
        return pickle.dumps(module)

    def tensor(stored: bytes) -> Calls:
        return Calls(torch._utils._rebuild_tensor_v2, Calls(load, stored), 0, (1,), (1,), False, {})

    return {
        "os.system": (pickle.dumps(Calls(os.system, f"touch {marker}")), "system"),
        "subprocess": (pickle.dumps({"net": Calls(subprocess.call, ["touch", marker])}), "subprocess.call"),
        "eval": (pickle.dumps(Calls(eval, f"open({marker!r}, 'w')")), "builtins.eval"),
        "exec": (pickle.dumps(Calls(exec, f"open({marker!r}, 'w')")), "builtins.exec"),
        "import": (pickle.dumps(Calls(__import__, "os")), "builtins.__import__"),
        "old protocol": (pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=0), "system"),
        "own function": (holding(Calls(tell, marker)), "tell"),
        "nested": (holding(tensor(nested.getvalue())), "system"),
        "nested zip": (holding(tensor(zipped.getvalue())), "an archive where"),
        "a tensor of a call": (holding(Calls(torch.save, 1, marker)), "'torch.serialization.save' is no tensor"),
    }


@pytest.mark.parametrize("name", attacks("x"))
def test_nothing_is_executed(tmp_path, name):
    marker = tmp_path / "executed"
    data, refused = attacks(str(marker))[name]
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(UserError, match=refused):
        read_released(tmp_path / "file.pkl")
    assert not marker.exists()


@pytest.mark.parametrize("name", ["os.system", "own function", "a tensor of a call"])
def test_the_attacks_are_real(tmp_path, name):
    """Plain pickle runs them: a test of refusals needs something to refuse."""
    marker = tmp_path / "executed"
    pickle.loads(attacks(str(marker))[name][0])
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["f8", ">f4", "i2", "?", "u1", "f2"])
def test_arrays_are_read_as_they_were(tmp_path, protocol, dtype):
    whole = (5 * np.random.default_rng(0).random((3, 4, 2))).astype(dtype)
    arrays = [whole, np.asfortranarray(whole), whole[::2], whole[:0]]
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"fid": arrays}, protocol))
    for stored, array in zip(read_pickle(tmp_path / "file.pkl")["fid"], arrays, strict=True):
        found = to_array(stored)
        assert found.dtype == array.dtype
        np.testing.assert_equal(found, array)


@pytest.mark.parametrize("data", [b"", b"no pickle", pickle.dumps({"a": 1})[:-3], b"\x80\x04\x8c\x02osR."])
def test_files_that_are_no_pickles_are_named(tmp_path, data):
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(UserError, match=r"file.pkl is no sound pickle"):
        read_pickle(tmp_path / "file.pkl")


def test_what_a_call_makes_cannot_be_changed(tmp_path):
    """BUILD with a pair as its state sets attributes: here the name of a recorded call."""
    data = b"\x80\x04ctorch\nTensor\n)R" + b"N}\x8c\x04name\x8c\x04evils\x86b."
    (tmp_path / "file.pkl").write_bytes(data)
    record = read_pickle(tmp_path / "file.pkl")
    assert isinstance(record, Object)
    assert record.name == "torch.Tensor"
