"""Read pickles of others without executing anything in them.

A pickle is a program: it names functions and calls them. The readers here (pickled_tensors.py, pickled_arrays.py) let
it build tensors or arrays and nothing else. pickle_scan.py looks through its opcodes first. A global name is then
either in the reader's table of what may be called, or inert (a class that stores what it is given, for module classes
and settings whose contents are wanted but whose code is not), or refused, by name. What is built is a stand-in (Made)
that a pickle can neither call nor change.
"""

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagenet.foreign.pickle_scan import Bounded, Refused, scan, shown
from tvm_ref.cli.errors import user_files
from tvm_ref.cli.progress import progress

MAX_CLASSES = 1000  # names of one file
MAX_AXES = 16  # of a tensor or array
INERT_PACKAGES = {  # of which a pickled module names classes; none is imported for it
    "torch", "torch_utils", "training", "timm", "omegaconf", "dnnlib",
    "typing", "collections", "contextlib", "functools",
}  # fmt: skip
INERT_BUILTINS = {"dict", "list", "set", "int", "long", "float", "bool", "str", "getattr"}  # of settings and of compile


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
        raise Refused(f"the pickle sets the attribute {shown(name)} of a function")

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        return self._function(*args)


class Once(Call):
    """A function called once for each first argument: the same bytes named a thousand times make one storage."""

    __slots__ = ("_known",)
    _known: dict[int, tuple[Any, Any]]

    def __init__(self, function: Callable[..., Any]):
        super().__init__(function)
        object.__setattr__(self, "_known", {})

    def __call__(self, *args: Any) -> Any:
        """Call the function, or return what it did; the argument is kept, so that its id stays its own."""
        key = id(args[0]) if args else 0
        if key not in self._known:
            self._known[key] = args[:1], self._function(*args)
        return self._known[key][1]


class Made:
    """What a pickle made of numbers: a stand-in that it can neither change nor call."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __setstate__(self, state: Any) -> None:
        raise Refused(f"the pickle changes a {type(self).__name__.lower()}")


def is_shape(numbers: Any) -> bool:
    """Return whether it is a tuple of few integers from 0 to 2^63 - 1."""
    few = isinstance(numbers, tuple) and len(numbers) <= MAX_AXES
    return few and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _encoded(text: str, encoding: str) -> bytes:
    """Encode a text in latin1."""
    if not isinstance(encoding, str) or encoding != "latin1" or not isinstance(text, str):
        raise Refused("_codecs.encode with another encoding than latin1")
    return codecs.encode(text, "latin1")


def old_bytes() -> dict[str, Any]:
    """List what protocols below 3 call to make bytes."""
    return {"_codecs.encode": Once(_encoded), "__builtin__.bytes": Call(lambda: b"")}


class _Reader(pickle.Unpickler):
    def __init__(self, stream: Bounded, remade: dict[str, Any], *, inert: bool):
        super().__init__(stream)
        self._remade, self._inert = remade, inert
        self._classes: dict[str, type[Inert]] = {}

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
            if full not in self._classes:
                self._classes[full] = type("Inert", (Inert,), {"name": full})
            if len(self._classes) > MAX_CLASSES:
                raise Refused(f"it names more than {MAX_CLASSES} classes")
            return self._classes[full]
        raise Refused(
            f"it asks for {shown(full)}, which is none of the names that are allowed; nothing of it was executed"
        )


@user_files()
def read(path: Path, remade: dict[str, Any], *, inert: bool) -> Any:
    """Read what a pickle builds by calling `remade`, by name, and with `inert` classes that are not loaded.

    Raises:
        Refused: it names anything else, or asks for more than its size can hold.
        UserError: it is no pickle, or cannot be read.
    """
    size, what = path.stat().st_size, f"reading {path.name}"
    with path.open("rb") as stream, progress(total=2 * size, unit="B", unit_scale=True, desc=what, delay=1) as bar:
        try:
            scan(Bounded(stream, size, bar))
            stream.seek(0)
            return _Reader(Bounded(stream, size, bar), remade, inert=inert).load()
        except Refused as error:
            raise Refused(f"{path} is refused: {error}") from None
        except MemoryError:
            raise ValueError(f"{path} asks for more memory than there is") from None
        except Exception as error:  # a damaged pickle can break the reader anywhere
            reason = shown(str(error).strip().partition("\n")[0]) or type(error).__name__
            raise ValueError(f"{path} is no sound pickle: {reason}") from None
