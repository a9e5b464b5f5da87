"""The weights that Luma released: which preset each file is, and its tensors, read without executing anything.

A released file is a pickle of a dict, with the averaged network as "ema" or "net". Its modules were pickled as calls of
a function that runs Python source, which the file holds as well. The arguments of that call contain the tensors.
"""

import io
import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from imagenet.foreign.restricted_pickle import Global, Machine, Object, Refused, read_pickle, to_bytes
from tvm_ref.cli.errors import UserError, require, user_errors

PRESETS = {  # by name of the file
    "im256_w2": "imagenet256-w2",
    "im256_w1p75": "imagenet256-w1.75",
    "im512_w2p5": "imagenet512-w2.5",
    "im512_w2p25": "imagenet512-w2.25",
}
WRAPPERS = re.compile(r"^((_orig_mod|model)\.)+")  # wrappers around the network, which prefix its names
MAX_PARTS = 20_000  # modules and tensors of one network, each as often as it stands in it
MAX_NAME = 500  # characters of a tensor's full name
MAX_LAYERS = 16  # of modules that are made with a module

MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before its archives, in which tensors still pickle their storages
DTYPES = {
    "torch.FloatStorage": torch.float32, "torch.DoubleStorage": torch.float64, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
}  # fmt: skip


class Released(NamedTuple):
    """The network of a released file: its tensors by name, and whether it is scaled (None: the file does not say)."""

    tensors: dict[str, Tensor]
    scaled: bool | None


def read_released(path: Path) -> Released:
    """Read the network of a released file.

    Raises:
        UserError: no such file, no pickle, one that asks for more than tensors, or one without a network.
    """
    content = read_pickle(path)
    with user_errors(path, UserError):
        network = _network(content)
        scaled = module_state(network).get("do_scale_param")
        return Released(tensors_of(network, path.stat().st_size), None if scaled is None else scaled is True)


def _network(content: Any) -> Any:
    """Find the network in the content of a file: the averaged one, if it holds several."""
    if not isinstance(content, dict):
        return content
    found = [content[key] for key in ("ema", "net") if content.get(key) is not None]
    if not found:
        keys = ", ".join(f"{key!r:.80}" for key in list(content)[:5])
        raise UserError(f"no network ('ema' or 'net') in it, only {keys or 'nothing'}")
    return found[0]


def module_state(module: Any) -> dict[str, Any]:
    """Return the attributes of a module of PyTorch, or of one that carries its source.

    Raises:
        UserError: the object is no module.
    """
    inner, first = module, None
    for _ in range(MAX_LAYERS):
        first = inner.args[0] if isinstance(inner, Object) and inner.state is None and inner.args else None
        if not isinstance(first, Object):
            break
        inner = first  # torch.compile's module is made with the module that it is around
    state = inner.state if isinstance(inner, Object) else None
    if state is None and isinstance(first, dict):
        state = first.get("state")
    if isinstance(state, dict) and all(isinstance(state.get(k), dict) for k in ("_parameters", "_buffers", "_modules")):
        return state
    name = f"{module.name!r:.80}" if isinstance(module, Object | Global) else type(module).__name__
    raise UserError(f"{name} is not a module of PyTorch")


def tensors_of(module: Any, size: int) -> dict[str, Tensor]:
    """Return parameters and buffers by the names that a state dict of the network would have, without wrappers.

    Args:
        module: an Object.
        size: bytes of the file, which all tensors together may not exceed.

    Raises:
        UserError: it is no module, or one of more than MAX_PARTS parts, such as one within itself.
    """
    storages, found = Storages(size), {}
    waiting, parts = [("", module)], 0
    while waiting:
        prefix, module = waiting.pop()
        state, children = module_state(module), []
        for kind in ("_parameters", "_buffers", "_modules"):
            for name, part in state[kind].items():
                parts += 1
                require(isinstance(name, str), f"{name!r:.80} is a name that is no text")
                full = prefix + name
                small = parts <= MAX_PARTS and len(full) <= MAX_NAME
                require(small, "it holds a module within itself, or too many of them, or too long a name")
                if part is None:
                    continue
                if kind == "_modules":
                    children.append((f"{full}.", part))
                else:
                    found[WRAPPERS.sub("", full)] = storages.tensor(part)
        waiting += children[::-1]
    return found


class Storages:
    """The flat tensors that all others are views of. Each is read once; together they are no larger than their file."""

    def __init__(self, size: int):
        self._left = size
        self._known: dict[int, Tensor] = {}  # by identity: what was read lives as long as its pickle's content

    def tensor(self, value: Any) -> Tensor:
        """Make a view of a storage. Gradients and hooks are left out.

        Raises:
            Refused: it is no tensor, or one that reaches beyond its storage.
        """
        match value:
            case Object(name="torch._utils._rebuild_parameter", args=(data, *_)) if data is not value:
                value = data
        match value:
            case Object(name="torch._utils._rebuild_tensor_v2", args=(storage, int(offset), size, stride, *_)):
                flat = self._flat(storage)
            case _:
                raise Refused(f"{value.name if isinstance(value, Object) else type(value).__name__!r:.80} is no tensor")
        sound = _is_shape(size) and _is_shape(stride) and len(size) == len(stride) and _is_shape((offset,))
        require(sound, "a tensor with a size, stride or offset that is none")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if math.prod(size) and max(last + 1, math.prod(size)) > len(flat):
            raise Refused(f"a tensor of size {size} reaches beyond its storage of {len(flat)} numbers")
        return flat.as_strided(size, stride, offset)

    def _flat(self, value: Any) -> Tensor:
        """Read a storage, which torch.save wrote: five pickles, the number of its numbers, and those."""
        match value:
            case Object(name="torch.storage._load_from_bytes", args=(stored,)):
                pass
            case _:
                raise Refused("a tensor is made of something else than a storage")
        if id(stored) not in self._known:
            data = to_bytes(stored)
            self._left -= len(data)
            require(self._left >= 0, "its tensors are larger than the file")
            self._known[id(stored)] = _read_storage(data)
        return self._known[id(stored)]


def _read_storage(data: bytes | bytearray) -> Tensor:
    """Read a storage: pickles of MAGIC, version, system, reference and keys; then its length, and its numbers."""
    require(data[:2] != b"PK", "an archive where a storage belongs")
    stream = io.BytesIO(data)
    with user_errors("a damaged storage", Exception):  # a damaged pickle can break the machine anywhere
        pickles = [Machine(stream, outside=True).load() for _ in range(5)]
    match pickles:
        case [magic, _, dict(system), Object(args=(_, Global(kind), _, _, int(length), *_)), _] if magic == MAGIC:
            little = system.get("little_endian", True) is True
        case _:
            raise Refused("something else where a storage belongs")
    known = kind in DTYPES and little
    require(known, f"a storage of {kind!r:.80}, or of another order of bytes than this machine's")
    start, dtype = stream.tell() + 8, DTYPES[kind]
    if int.from_bytes(stream.read(8), "little") != length or not 0 <= length * dtype.itemsize <= len(data) - start:
        raise Refused(f"a damaged storage: {length} numbers in {len(data) - start} bytes")
    numbers = bytearray(memoryview(data)[start : start + length * dtype.itemsize])
    return torch.frombuffer(numbers, dtype=dtype) if length else torch.empty(0, dtype=dtype)


def _is_shape(numbers: Any) -> bool:
    """Return whether it is a tuple of few integers from 0 to 2^63 - 1."""
    few = isinstance(numbers, tuple) and len(numbers) <= 16
    return few and all(type(n) is int and 0 <= n < 2**63 for n in numbers)
