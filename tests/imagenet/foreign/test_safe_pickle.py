import io
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from imagenet.foreign.pickle_scan import Refused
from imagenet.foreign.pickled_arrays import read_arrays
from imagenet.foreign.pickled_tensors import read_module, tensors_of


class Calls:
    """Pickles as a call of a function with arguments."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def tell(path: str) -> None:
    Path(path).write_text("executed")


def raw(module: str, name: str, argument: str) -> bytes:
    """A pickle, by hand, that calls module.name(argument)."""
    return b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + (
        b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."
    )  # fmt: skip


def attacks(marker: str) -> dict[str, tuple[bytes, str]]:
    """Pickles that try to make the file `marker`, and what their refusal must name."""
    nested, zipped = io.BytesIO(), io.BytesIO()
    torch.save(Calls(os.system, f"touch {marker}"), nested, _use_new_zipfile_serialization=False)
    torch.save(Calls(os.system, f"touch {marker}"), zipped)
    in_parameters = nn.Linear(1, 1).__dict__ | {"_parameters": {"weight": Calls(tell, marker)}}
    return {
        "os.system": (pickle.dumps(Calls(os.system, f"touch {marker}")), "system"),
        "subprocess": (pickle.dumps({"net": Calls(subprocess.call, ["touch", marker])}), "subprocess.call"),
        "eval": (pickle.dumps(Calls(eval, f"open({marker!r}, 'w')")), "builtins.eval"),
        "exec": (raw("builtins", "exec", f"open({marker!r}, 'w')"), "builtins.exec"),
        "import": (raw("builtins", "__import__", "os"), "builtins.__import__"),
        "own function": (pickle.dumps(Calls(tell, marker)), "tell"),
        "in parameters": (pickle.dumps(in_parameters), "tell"),
        "old protocol": (pickle.dumps(Calls(os.system, f"touch {marker}"), protocol=0), "system"),
        "through a package": (raw("torch", "os.system", f"touch {marker}"), "torch.os.system"),
        "nested": (pickle.dumps(Calls(torch.storage._load_from_bytes, nested.getvalue())), "system"),
        "nested zip": (pickle.dumps(Calls(torch.storage._load_from_bytes, zipped.getvalue())), "an archive where"),
        "outside": (b"\x80\x04\x8c\x04evilQ.", "outside of it"),
    }


@pytest.mark.parametrize("read", [read_module, read_arrays])
@pytest.mark.parametrize("name", attacks(""))
def test_what_a_pickle_may_not_call_is_refused_by_name_and_not_run(tmp_path, name, read):
    marker = tmp_path / "executed"
    data, refused = attacks(str(marker))[name]
    (tmp_path / "file.pkl").write_bytes(data)
    if read is read_arrays and name.startswith("nested"):
        refused = "_load_from_bytes"
    with pytest.raises(Refused, match=refused):
        read(tmp_path / "file.pkl")
    assert not marker.exists()


def test_the_attacks_are_real(tmp_path):
    """Plain pickle runs them: a test of refusals needs something to refuse."""
    marker = tmp_path / "executed"
    pickle.loads(attacks(str(marker))["os.system"][0])
    assert marker.exists()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_modules_are_read_as_their_state_dict(tmp_path, protocol):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2, bias=False)))
    tied = module[0].weight
    module.register_parameter("tied", tied)
    module.register_buffer("view", torch.arange(12.0).view(3, 4).T[1:])
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"net": module, "dtype": torch.bfloat16}, protocol))
    found = tensors_of(read_module(tmp_path / "file.pkl")["net"])
    assert found.keys() == module.state_dict().keys()
    for name, tensor in module.state_dict().items():
        assert torch.equal(found[name], tensor)
    assert found["tied"].data_ptr() == found["0.weight"].data_ptr()  # no copy is made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_tensors_keep_their_type(tmp_path, dtype):
    module = nn.Module()
    module.register_buffer("a", torch.tensor([[1, 0], [3, 4]]).to(dtype))
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(module))
    a = tensors_of(read_module(tmp_path / "file.pkl"))["a"]
    assert a.dtype == dtype
    assert torch.equal(a, module.a)


def storage() -> Calls:
    data = io.BytesIO()
    torch.save(torch.arange(4.0).storage(), data, _use_new_zipfile_serialization=False)
    return Calls(torch.storage._load_from_bytes, data.getvalue())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, (5,), (1,)), "beyond its storage"),
        ((3, (2,), (1,)), "beyond its storage"),
        ((0, (2, 2), (3, 2)), "beyond its storage"),
        ((-1, (2,), (1,)), "is none"),
        ((0, (-2,), (1,)), "is none"),
        ((0, (2,), (-1,)), "is none"),
        ((0, (2,), (1, 1)), "is none"),
    ],
)
def test_tensors_that_reach_beyond_their_storage_are_refused(tmp_path, arguments, message):
    call = Calls(torch._utils._rebuild_tensor_v2, storage(), *arguments, False, {})
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(call))
    with pytest.raises(Refused, match=message):
        read_module(tmp_path / "file.pkl")


def test_a_nested_pickle_that_is_no_storage_is_refused(tmp_path):
    data = io.BytesIO()
    torch.save(torch.ones(2), data)
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(Calls(torch.storage._load_from_bytes, data.getvalue())))
    with pytest.raises(Refused, match="where a storage belongs"):
        read_module(tmp_path / "file.pkl")


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("dtype", ["f8", ">f4", "i2", "?", "u1", "f2"])
def test_arrays_are_read_as_they_were(tmp_path, protocol, dtype):
    rng = np.random.default_rng(0)
    array = (5 * rng.random((3, 4, 2))).astype(dtype)
    value = {
        "fid": {"mu": array, "sigma": np.asfortranarray(array)},
        "list": [array[::2], (1.5, "text", None, True)],
        "empty": array[:0],
        "scalar": np.float64(0.1),
        "int": np.int64(7),
    }
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(value, protocol))
    read = read_arrays(tmp_path / "file.pkl")
    np.testing.assert_equal(read, value)
    assert read["fid"]["sigma"].dtype == array.dtype


@pytest.mark.parametrize("value", [np.array([{}, 1], dtype=object), np.zeros(2, "f4,i4"), np.array(["a"])])
def test_arrays_of_objects_are_refused(tmp_path, value):
    (tmp_path / "file.pkl").write_bytes(pickle.dumps({"mu": value}))
    with pytest.raises(Refused, match="only plain numbers"):
        read_arrays(tmp_path / "file.pkl")


@pytest.mark.parametrize("read", [read_module, read_arrays])
@pytest.mark.parametrize(
    "data", [b"", b"no pickle", pickle.dumps({"a": 1})[:-3], b"\x80\x04\x8c\x02osR.", b"PK\x03\x04"]
)
def test_files_that_are_no_pickles_are_named(tmp_path, read, data):
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(ValueError, match="is no sound pickle"):
        read(tmp_path / "file.pkl")


def test_what_holds_itself_is_no_reason_to_crash(tmp_path):
    around: dict = {}
    around["again"] = around
    (tmp_path / "file.pkl").write_bytes(pickle.dumps(around))
    with pytest.raises(ValueError, match="within itself"):
        read_arrays(tmp_path / "file.pkl")


def test_sizes_that_are_lies_are_no_reason_to_crash(tmp_path):
    (tmp_path / "file.pkl").write_bytes(b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"short.")
    with pytest.raises(ValueError, match=r"no sound pickle|more memory"):
        read_module(tmp_path / "file.pkl")


def test_functions_that_may_be_called_cannot_be_changed(tmp_path):
    """BUILD with a pair as its state sets attributes: here __defaults__ of the function that makes tensors."""
    data = b"\x80\x04ctorch._utils\n_rebuild_tensor_v2\nN}\x8c\x09_functionK\x01s\x86b."
    (tmp_path / "file.pkl").write_bytes(data)
    with pytest.raises(Refused, match="sets the attribute _function"):
        read_module(tmp_path / "file.pkl")


def test_what_is_no_module_is_named(tmp_path):
    for value in ({"a": 1}, torch.nn.Identity):
        (tmp_path / "file.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match="is not a module"):
            tensors_of(read_module(tmp_path / "file.pkl"))
