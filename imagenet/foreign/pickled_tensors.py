"""Read modules out of pickles, as tensors by name, without executing anything."""

import io
import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from imagenet.foreign.pickle_scan import Bounded, Refused, scan, shown
from imagenet.foreign.safe_pickle import Call, Inert, Made, Once, is_shape, old_bytes, read

MAX_TENSORS = 20_000  # and modules of one network, each as often as it stands in it
MAX_NAME = 500  # letters of a tensor's name, with those of the modules around it
MAX_LAYERS = 16  # of modules that are made with a module

MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its archives, in which tensors still pickle their storages
_PLAIN = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _PLAIN.items()}


class Storage(Made):
    """A flat tensor."""

    __slots__ = ()


class Parameter(Made):
    """A tensor."""

    __slots__ = ()


class Dict(dict):
    """An OrderedDict without attributes, of which a pickle could replace `items`."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Ignore attributes, as _metadata of a state dict."""


class _StorageReader(pickle.Unpickler):
    """Reads ("storage", kind, key, place, length, None), the reference that stands for a storage."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the dtype of a kind of storage."""
        if f"{module}.{name}" not in STORAGES:
            raise Refused(f"a nested pickle asks for {shown(f'{module}.{name}')}, which is no storage")
        return STORAGES[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, int]:
        """Return dtype and length."""
        if not isinstance(pid, tuple) or len(pid) < 5 or not isinstance(pid[1], torch.dtype) or type(pid[4]) is not int:
            raise Refused("a nested pickle refers to something that is no storage")
        return pid[1], pid[4]


def _storage(data: bytes) -> Storage:
    """Read a storage that torch.save wrote: pickles of MAGIC, version, system, reference, keys; length, numbers."""
    if not isinstance(data, bytes) or data[:2] == b"PK":
        raise Refused(f"{'an archive' if isinstance(data, bytes) else 'something else'} where a storage belongs")
    stream = io.BytesIO(data)
    pickles = []
    for _ in range(5):
        start = stream.tell()
        scan(Bounded(stream, len(data) - start), outside=True)
        stream.seek(start)
        pickles.append(_StorageReader(stream).load())
    match pickles:
        case [magic, _, dict(system), (torch.dtype() as dtype, int(length)), _] if magic == MAGIC:
            little = system.get("little_endian", True) is True
        case _:
            raise Refused("a nested pickle holds something else where a storage belongs")
    start, size = stream.tell() + 8, length * dtype.itemsize
    if not little or int.from_bytes(stream.read(8), "little") != length or not 0 <= size <= len(data) - start:
        raise Refused(f"a damaged storage: {length} numbers in {len(data) - start} bytes")
    if not length:
        return Storage(torch.empty(0, dtype=dtype))
    return Storage(torch.frombuffer(bytearray(memoryview(data)[start : start + size]), dtype=dtype))


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Parameter:
    """Make a view of a storage; beyond its end nothing is read. Gradients and hooks are left out."""
    if not isinstance(storage, Storage):
        raise Refused("a tensor is made of something else than a storage")
    if not (is_shape(size) and is_shape(stride) and len(size) == len(stride) and is_shape((offset,))):
        raise Refused("a tensor with a size, stride or offset that is none")
    flat = storage.value
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(flat):
        raise Refused(f"a tensor of size {size} reaches beyond its storage of {len(flat)} numbers")
    return Parameter(flat.as_strided(size, stride, offset))


def _dict(*items: Any) -> Dict:
    """Make an empty dict."""
    if items:
        raise Refused("an OrderedDict that is made at once, as no pickle of today makes it")
    return Dict()


def tensor_names() -> dict[str, Any]:
    """List what a pickle of modules may call, by name."""
    return {
        **old_bytes(),
        "torch._utils._rebuild_tensor_v2": Call(_tensor),
        "torch._utils._rebuild_parameter": Call(lambda data, *_: data),
        "torch.storage._load_from_bytes": Once(_storage),
        "collections.OrderedDict": Call(_dict),
    }


def read_module(path: Path) -> Any:
    """Read a pickle of modules: dicts, lists, a Parameter for each tensor, an Inert for each other object.

    Raises:
        Refused: it names anything else, or holds no sound tensors.
        ValueError, OSError: it is no pickle, or cannot be read.
    """
    return read(path, tensor_names(), inert=True)


def tensors_of(module: Any) -> dict[str, Tensor]:
    """Return the parameters and buffers of an Inert module by the names that its state_dict would have.

    Raises:
        ValueError: the object is no module, or one of more than MAX_TENSORS parts, such as one within itself.
    """
    found: dict[str, Tensor] = {}
    waiting, parts = [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        state = module_state(module)
        children = []
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, part in state[kind].items():
                parts += 1
                if not isinstance(name, str):
                    raise ValueError(f"{shown(prefix)}{shown(repr(name))} is a name that is no text")
                if len(prefix) + len(name) > MAX_NAME:
                    raise ValueError(f"it holds a module within itself, or a name of more than {MAX_NAME} letters")
                if parts > MAX_TENSORS:
                    raise ValueError(f"it holds a module within itself, or more than {MAX_TENSORS} modules and tensors")
                if isinstance(part, Parameter):
                    found[prefix + name] = part.value
                elif kind == "_modules" and part is not None:
                    children.append((f"{prefix}{name}.", part))
        waiting += children[::-1]
    return found


def module_state(module: Any) -> dict[str, Any]:
    """Return the attributes of an Inert module: its state, or that which a class that carries its source is made with.

    Raises:
        ValueError: the object is no module.
    """
    kinds = ("_parameters", "_buffers", "_modules")
    inner = module
    for _ in range(MAX_LAYERS):
        first = inner.args[0] if isinstance(inner, Inert) and inner.state is None and inner.args else None
        if not isinstance(first, Inert):
            break
        inner = first  # torch.compile's module is made with the module that it is around
    state = inner.state if isinstance(inner, Inert) else None
    if state is None and isinstance(first, dict):
        state = first.get("state")
    if isinstance(state, dict) and all(isinstance(state.get(kind), dict) for kind in kinds):
        return state
    name = shown(module.name) if isinstance(module, Inert) else type(module).__name__
    raise ValueError(f"{name} is not a module of PyTorch")
