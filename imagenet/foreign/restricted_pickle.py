"""Read untrusted pickles without executing anything in them.

A pickle is a program for a small machine: it puts objects on a stack, names functions and calls them. The machine here
calls nothing. A name becomes a Global, and a call becomes an Object, which records the function's name and arguments.
`to_array` and luma.py turn such records into arrays and tensors if they know the name.

A small file cannot cost much memory or time either: lengths beyond the file's end stop the reading, the number of steps
is bounded, and keys are numbers or texts (the hash of a tuple of shared tuples, n deep, takes 2^n steps).
"""

import mmap
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tvm_ref.cli.errors import UserError, first_line, user_files

MAX_STEPS = 120_000  # two networks of 28 blocks, with what torch.compile puts around them, take 49,000
MAX_KEY = 2**60  # larger integers can share their hashes, which makes a dictionary a list to search
PACKAGES = {  # whose names stand in released files; none is imported for it
    "torch", "torch_utils", "training", "timm", "omegaconf", "dnnlib", "numpy",
    "typing", "collections", "contextlib", "functools",
}  # fmt: skip
BUILTINS = {"dict", "list", "set", "int", "long", "float", "bool", "str", "bytes", "getattr"}
NEEDLESS = (  # opcodes for instances of Python 2, extensions, buffers outside, and what no released file has
    pickle.INST, pickle.OBJ, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
    pickle.DICT, pickle.FROZENSET, pickle.NEWOBJ_EX,
)  # fmt: skip


class Refused(UserError):
    """A pickle asks for something that its readers do not support."""


class Global(NamedTuple):
    """A name such as torch.nn.modules.linear.Linear. It is never looked up."""

    name: str


class Object:
    """A call that was not made, such as of a class: its name, the arguments, and the state that was to be set."""

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args, self.state = name, args, None

    def append(self, item: Any) -> None:
        """Ignore an item of a class like a list."""


class Machine(pickle._Unpickler):
    """The standard library's unpickler in Python, whose opcodes that call or change objects only record it.

    Args:
        stream: at the pickle's beginning; left behind its end.
        outside: allow references to something outside of the pickle, as torch.save's to storages; each is an Object.
    """

    stack: list[Any]  # these four are pickle._Unpickler's
    append: Callable[[Any], None]  # to the stack
    pop_mark: Callable[[], list[Any]]  # off the stack
    read: Callable[[int], bytes]

    def __init__(self, stream: BinaryIO | mmap.mmap, *, outside: bool = False):
        super().__init__(stream)
        self._outside, self.steps = outside, 0

    def find_class(self, module: str, name: str) -> Global:
        """Record a name. Any would be harmless, but a file that holds others than these means harm."""
        full, package = f"{module}.{name}", module.partition(".")[0]
        builtin = module in ("builtins", "__builtin__") and name in BUILTINS
        known = package in PACKAGES or package.startswith("_imported_module_") or full == "_codecs.encode" or builtin
        if not known or "." in name:  # with a dot it would reach through an object to another
            raise Refused(f"it asks for {full!r:.80}, which is not among the names allowed; nothing of it was executed")
        return Global(full)

    def persistent_load(self, pid: Any) -> Object:
        """Record a reference to something outside of the pickle."""
        if not self._outside or not isinstance(pid, tuple):
            raise Refused("it refers to something outside of it")
        return Object("reference", pid)

    def call(self) -> None:
        """REDUCE and NEWOBJ: record a call. The arguments are shared with other records, never copied."""
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or type(args) is not tuple:
            raise Refused("it calls something that is no function")
        ordered = function.name == "collections.OrderedDict" and not args
        self.append({} if ordered else Object(function.name, args))

    def build(self) -> None:
        """BUILD: record the state of an object; attributes of anything else, as of an OrderedDict, are left out."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Object):
            self.stack[-1].state = state

    def set_item(self) -> None:
        """SETITEM: put one item into a dictionary."""
        value, key = self.stack.pop(), self.stack.pop()
        self._update([key, value])

    def set_items(self) -> None:
        """SETITEMS: put the items above the mark into a dictionary."""
        self._update(self.pop_mark())

    def add_items(self) -> None:
        """ADDITEMS: put what is above the mark into a set."""
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(_key, items))

    def read_bytearray(self) -> None:
        """BYTEARRAY8: read bytes; the standard library makes room for as many as are announced."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytearray(self.read(size)))

    def _update(self, items: list[Any]) -> None:
        """Put keys and values, in turn, into the dictionary on top of the stack. A class like a dict ignores them."""
        if isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))

    def needless(self) -> None:
        """Refuse an opcode."""
        raise Refused("it uses an opcode that nothing read here needs")


def _key(key: Any) -> Any:
    """Return a key of a dictionary or a member of a set."""
    if type(key) not in (str, bytes, int, float, bool, type(None)) or (type(key) is int and abs(key) >= MAX_KEY):
        raise Refused("it has a key of a dictionary, or a member of a set, that is neither a number nor a text")
    return key


def _counted(opcode: Callable[[Any], None]) -> Callable[[Any], None]:
    """Count an opcode before it is done."""

    def counted(machine: Machine) -> None:
        machine.steps += 1
        if machine.steps > MAX_STEPS:
            raise Refused(f"it is made of more than {MAX_STEPS} objects and steps")
        opcode(machine)

    return counted


OPCODES: dict[int, Callable[[Any], None]] = {
    **pickle._Unpickler.dispatch,
    **{code[0]: Machine.call for code in (pickle.REDUCE, pickle.NEWOBJ)},
    pickle.BUILD[0]: Machine.build,
    pickle.SETITEM[0]: Machine.set_item,
    pickle.SETITEMS[0]: Machine.set_items,
    pickle.ADDITEMS[0]: Machine.add_items,
    pickle.BYTEARRAY8[0]: Machine.read_bytearray,
    **{code[0]: Machine.needless for code in NEEDLESS},
}
Machine.dispatch = {code: _counted(opcode) for code, opcode in OPCODES.items()}


@user_files()
def read_pickle(path: Path) -> Any:
    """Read what a pickle holds: dicts, lists, numbers, texts, bytes, and an Object for each call.

    Raises:
        Refused: it asks for more than that.
        UserError: it is no pickle, or cannot be read.
    """
    with path.open("rb") as stream:
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:  # read on demand
                return Machine(content).load()
        except Refused as error:
            raise Refused(f"{path} is refused: {error}") from None
        except Exception as error:  # a damaged pickle can break the machine anywhere
            raise UserError(f"{path} is no sound pickle: {first_line(error):.200}") from None


def to_bytes(value: Any) -> bytes | bytearray:
    """Return bytes, which protocols below 3 write as a call.

    Raises:
        Refused: it is something else.
    """
    match value:
        case bytes() | bytearray():
            return value
        case Object(name="_codecs.encode", args=(str(text), "latin1")):
            return text.encode("latin1")
        case Object(name="__builtin__.bytes", args=()):
            return b""
    raise Refused("something else stands where bytes belong")


def to_array(value: Any) -> NDArray[Any]:
    """Return an array of numbers, as numpy 1 and numpy 2 pickle it.

    Raises:
        Refused: it is something else, or damaged.
    """
    order: Any = "C"
    match value:
        case Object(
            name="numpy.core.multiarray._reconstruct" | "numpy._core.multiarray._reconstruct",
            state=(_, shape, dtype, fortran, data),
        ):
            order = "F" if fortran else "C"
        case Object(
            name="numpy.core.numeric._frombuffer" | "numpy._core.numeric._frombuffer", args=(data, dtype, shape, order)
        ):
            pass
        case _:
            raise Refused("something else stands where an array belongs")
    try:
        return np.frombuffer(to_bytes(data), _to_dtype(dtype)).reshape(shape, order=order)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(f"a damaged array: {first_line(error):.80}") from None


def _to_dtype(value: Any) -> np.dtype[Any]:
    """Return a dtype of plain numbers."""
    match value:
        case Object(name="numpy.dtype", args=(str(code), *_)) if code[:1] in tuple("fiub") and code[1:].isdecimal():
            state = value.state
            big = isinstance(state, tuple) and len(state) > 1 and state[1] == ">"
            return np.dtype(code).newbyteorder(">" if big else "<")
    raise Refused("an array of something else than plain numbers")
