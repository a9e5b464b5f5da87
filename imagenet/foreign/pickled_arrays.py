"""Read numpy arrays out of pickles without executing anything."""

from pathlib import Path
from typing import Any

import numpy as np

from imagenet.foreign.pickle_scan import Refused, shown
from imagenet.foreign.safe_pickle import Call, Made, is_shape, old_bytes, read


class _DType:
    """A numpy.dtype of plain numbers."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, *_: Any):
        name = code if isinstance(code, str) else type(code).__name__
        if name != code or name[:1] not in tuple("fiub") or not name[1:].isdigit():
            raise Refused(f"an array of dtype '{shown(name)}': only plain numbers are read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class Array(Made):
    """A numpy.ndarray that is filled by its state."""

    __slots__ = ()

    def __init__(self, *_: Any):
        super().__init__(np.empty(0))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _array(data, dtype, shape, "F" if fortran else "C").value


def _array(data: bytes | bytearray, dtype: _DType, shape: tuple[int, ...], order: str) -> Array:
    """Make an array of plain numbers."""
    if not isinstance(dtype, _DType) or not isinstance(data, bytes | bytearray) or not is_shape(shape):
        raise Refused("an array of something else than plain numbers")
    made = Array()
    try:
        made.value = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
    except (ValueError, TypeError) as error:
        raise Refused(f"a damaged array: {error}") from None
    return made


def _scalar(dtype: _DType, data: bytes) -> float:
    """Make a number."""
    return _array(data, dtype, (), "C").value.item()


def _numpy(*names: str) -> list[str]:
    """List names as numpy 1 and numpy 2 call them."""
    return [f"numpy.{core}.{name}" for core in ("core", "_core") for name in names]


def array_names() -> dict[str, Any]:
    """List what a pickle of arrays may call, by name."""
    return {
        **old_bytes(),
        **dict.fromkeys(_numpy("multiarray._reconstruct"), Call(lambda *_: Array())),
        **dict.fromkeys(_numpy("numeric._frombuffer"), Call(_array)),
        **dict.fromkeys(_numpy("multiarray.scalar"), Call(_scalar)),
        "numpy.ndarray": Call(lambda *_: Array()),  # only ever told to _reconstruct
        "numpy.dtype": Call(_DType),
    }


def read_arrays(path: Path) -> Any:
    """Read a pickle of dicts, lists, numbers, strings and numpy arrays of numbers.

    Raises:
        Refused: it names anything else.
        ValueError, OSError: it is no pickle, or cannot be read.
    """
    try:
        return _plain(read(path, array_names(), inert=False), {})
    except RecursionError:
        raise ValueError(f"{path} holds something within itself, or too deep") from None


def _plain(value: Any, known: dict[int, Any]) -> Any:
    """Put numpy arrays in the places of their stand-ins; what is shared is walked through once."""
    if id(value) not in known:
        if isinstance(value, dict):
            known[id(value)] = {key: _plain(item, known) for key, item in value.items()}
        elif isinstance(value, list | tuple):
            known[id(value)] = type(value)(_plain(item, known) for item in value)
        else:
            known[id(value)] = value.value if isinstance(value, Made) else value
    return known[id(value)]
