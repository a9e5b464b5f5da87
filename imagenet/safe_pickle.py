"""Read pickles of others without executing anything in them.

A pickle is a program: it names functions and calls them. Two readers here let it build tensors or arrays and nothing
else. A global name is either remade by this module (the tables REMADE_*), or inert (a fresh class that stores what it
is given, for module classes and settings whose contents are wanted but whose code is not), or refused, by name.
"""

import codecs
import io
import math
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


class Refused(ValueError):
    """A pickle asks for something that these readers do not give."""


class Inert:
    """An object of a class that is not loaded: its name, arguments and state, and no behaviour."""

    name = ""
    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """Make one with or without __init__ being called, as pickles do."""
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore an item of a class like a dict."""

    def append(self, item: Any) -> None:
        """Ignore an item of a class like a list."""


class Call:
    """A function that a pickle may call. It has no attributes that a pickle could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"the pickle sets the attribute {name} of a function")

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)


# Tensors ------------------------------------------------------------------------------------------------------------


def _storage(data: bytes) -> Tensor:
    """Read a storage as a flat tensor: a pickle within the pickle, which passes through PyTorch's own safe reader."""
    try:
        with warnings.catch_warnings(action="ignore"):
            storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise Refused(f"a nested pickle is refused: {_refused_name(str(error))}") from None
    if not isinstance(storage, torch.storage.TypedStorage):
        raise Refused(f"a nested pickle holds a {type(storage).__name__} where a storage belongs")
    return torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)


def _refused_name(message: str) -> str:
    """Say what PyTorch's reader refused, without its advice on how to read the file all the same."""
    lines = [line.strip() for line in message.splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else message.strip().splitlines()[0]


def _tensor(flat: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """Make a view of a storage; beyond its end nothing is read. Gradients and hooks are left out."""
    if not isinstance(flat, Tensor) or flat.ndim != 1:
        raise Refused(f"a tensor is made of a {type(flat).__name__} where a storage belongs")
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise Refused(f"a tensor of size {size} and stride {stride} from {offset} is none")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) and last >= len(flat):
        raise Refused(f"a tensor of size {size} reaches beyond its storage of {len(flat)} numbers")
    return flat.as_strided(size, stride, offset)


def _encoded(text: str, encoding: str) -> bytes:
    if encoding != "latin1" or not isinstance(text, str):
        raise Refused(f"_codecs.encode with encoding {encoding!r}")
    return codecs.encode(text, "latin1")


OLD_BYTES: dict[str, Any] = {  # how protocols below 3 write bytes
    "_codecs.encode": Call(_encoded),
    "__builtin__.bytes": Call(lambda: b""),
}
REMADE_TENSORS: dict[str, Any] = {
    **OLD_BYTES,
    "torch._utils._rebuild_tensor_v2": Call(_tensor),
    "torch._utils._rebuild_parameter": Call(lambda data, *_: data),
    "torch.storage._load_from_bytes": Call(_storage),
    "collections.OrderedDict": OrderedDict,
}
INERT_PACKAGES = {  # of which a pickled module names classes; none is imported for it
    "torch", "torch_utils", "training", "timm", "omegaconf", "dnnlib",
    "typing", "collections", "contextlib", "functools",
}  # fmt: skip
INERT_BUILTINS = {"dict", "list", "set", "int", "long", "float", "bool", "str", "getattr"}  # of settings and of compile


def read_module(path: Path) -> Any:
    """Read a pickle of modules: dicts, lists, tensors, and an Inert for each module and each other object.

    Raises:
        Refused: it names anything else, or holds no sound tensors.
        ValueError, OSError: it is no pickle, or cannot be read.
    """
    return _read(path, REMADE_TENSORS, inert=True)


def tensors_of(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters and buffers of an Inert module by the names that its state_dict would have.

    Raises:
        ValueError: the object is no module.
    """
    state = module_state(module)
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        for name, tensor in state[kind].items():
            if isinstance(tensor, Tensor):
                found[prefix + name] = tensor
    for name, child in state["_modules"].items():
        if child is not None:
            found |= tensors_of(child, f"{prefix}{name}.")
    return found


def module_state(module: Any) -> dict[str, Any]:
    """Return the attributes of an Inert module: its state, or that which a class that carries its source is made with.

    Raises:
        ValueError: the object is no module.
    """
    state = module.state if isinstance(module, Inert) else None
    if state is None and isinstance(module, Inert) and module.args:
        first = module.args[0]
        if isinstance(first, Inert):  # torch.compile's module around a module
            return module_state(first)
        state = first.get("state") if isinstance(first, dict) else None
    kinds = ("_parameters", "_buffers", "_modules")
    if isinstance(state, dict) and all(isinstance(state.get(kind), dict) for kind in kinds):
        return state
    raise ValueError(f"{getattr(module, 'name', type(module).__name__)} is not a module of PyTorch")


# Arrays -------------------------------------------------------------------------------------------------------------


class _DType:
    """A numpy.dtype of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        if not isinstance(code, str) or code[:1] not in tuple("fiub") or not code[1:].isdigit():
            raise Refused(f"an array of dtype {code!r}: only plain numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """A numpy.ndarray that is filled by its state."""

    __slots__ = ("array",)

    def __init__(self, *_: Any):
        self.array = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.array = _array(data, dtype, shape, "F" if fortran else "C").array


def _array(data: bytes, dtype: _DType, shape: tuple[int, ...], order: str) -> _Array:
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray):
        raise Refused("an array of something else than plain numbers")
    made = _Array()
    try:
        made.array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    except (ValueError, TypeError) as error:
        raise Refused(f"a damaged array: {error}") from None
    return made


def _scalar(dtype: _DType, data: bytes) -> float:
    return _array(data, dtype, (), "C").array.item()


def _numpy(*names: str) -> list[str]:
    return [f"numpy.{core}.{name}" for core in ("core", "_core") for name in names]


REMADE_ARRAYS: dict[str, Any] = {
    **OLD_BYTES,
    **dict.fromkeys(_numpy("multiarray._reconstruct"), Call(lambda *_: _Array())),
    **dict.fromkeys(_numpy("numeric._frombuffer"), Call(_array)),
    **dict.fromkeys(_numpy("multiarray.scalar"), Call(_scalar)),
    "numpy.ndarray": Call(lambda *_: _Array()),  # only ever an argument of _reconstruct
    "numpy.dtype": Call(_DType),
}


def read_arrays(path: Path) -> Any:
    """Read a pickle of dicts, lists, numbers, strings and numpy arrays of numbers.

    Raises:
        Refused: it names anything else.
        ValueError, OSError: it is no pickle, or cannot be read.
    """
    try:
        return _plain(_read(path, REMADE_ARRAYS, inert=False))
    except RecursionError:
        raise ValueError(f"{path} holds something within itself") from None


def _plain(value: Any) -> Any:
    """Put numpy arrays in the places of their stand-ins."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value.array if isinstance(value, _Array) else value


# The reader ---------------------------------------------------------------------------------------------------------


class _Watched:
    """A file, as far as an unpickler needs one, that moves a progress bar."""

    def __init__(self, stream: BinaryIO, bar: Any):
        self._stream, self._bar = stream, bar

    def read(self, n: int) -> bytes:
        data = self._stream.read(n)
        self._bar.update(len(data))
        return data

    def readline(self) -> bytes:
        data = self._stream.readline()
        self._bar.update(len(data))
        return data


class _Reader(pickle.Unpickler):
    def __init__(self, stream: _Watched, remade: dict[str, Any], *, inert: bool):
        super().__init__(stream)
        self._remade, self._inert = remade, inert

    def find_class(self, module: str, name: str) -> Any:
        """Return what stands for a global name.

        Raises:
            Refused: nothing does.
        """
        full = f"{module}.{name}"
        if full in self._remade:
            return self._remade[full]
        package = module.partition(".")[0]
        builtin = module in ("builtins", "__builtin__") and name in INERT_BUILTINS
        known = package in INERT_PACKAGES or package.startswith("_imported_module_") or builtin
        if self._inert and known and "." not in name:  # with a dot it would reach through an object to another
            return type("Inert", (Inert,), {"name": full})
        raise Refused(f"it asks for {full}, which is none of the names that are allowed; nothing of it was executed")

    def persistent_load(self, pid: Any) -> Any:
        """Refuse a reference to something outside of the file.

        Raises:
            Refused: always.
        """
        raise Refused(f"it refers to something outside of it, {str(pid)[:80]!r}")


def _read(path: Path, remade: dict[str, Any], *, inert: bool) -> Any:
    size, what = path.stat().st_size, f"reading {path.name}"
    with path.open("rb") as stream, tqdm(total=size, unit="B", unit_scale=True, desc=what, delay=1) as bar:
        try:
            return _Reader(_Watched(stream, bar), remade, inert=inert).load()
        except Refused as error:
            raise Refused(f"{path} is refused: {error}") from None
        except MemoryError:
            raise ValueError(f"{path} asks for more memory than there is") from None
        except Exception as error:  # a damaged pickle can break the reader anywhere
            reason = str(error).strip().splitlines()
            raise ValueError(f"{path} is no sound pickle: {reason[0] if reason else type(error).__name__}") from None
