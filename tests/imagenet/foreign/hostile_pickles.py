"""Small pickles that ask for much memory, much time, or the terminal."""

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch

from imagenet.foreign.luma import read_released
from imagenet.foreign.restricted_pickle import read_pickle, to_array

SEQUENCE = 100  # doublings of what is shared: 2^100 steps for whoever takes it apart


def text(a: str) -> bytes:
    return b"X" + struct.pack("<I", len(a.encode())) + a.encode()


def blob(a: bytes) -> bytes:
    return b"B" + struct.pack("<I", len(a)) + a


def name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def doubled(times: int = SEQUENCE) -> bytes:
    """A tuple of a tuple, twice, of a tuple, twice, ..."""
    return b")" + b"".join(b"q\x010h\x01h\x01\x86" for _ in range(times))


def nested(times: int) -> bytes:
    """A list in a list in a list ..."""
    return b"]" * times + b"a" * (times - 1)


def module(parameters: bytes = b"}", modules: bytes = b"}") -> bytes:
    state = b"}(" + text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules") + modules + b"u"
    return name("torch.nn", "Module") + b")\x81" + state + b"b"


def entry(key: bytes, value: bytes) -> bytes:
    return b"}" + key + value + b"s"


def shared_modules(times: int) -> bytes:
    """A module whose two children are one, whose two children are one, ..."""
    made = module()
    for _ in range(times):
        both = b"}(" + text("a") + b"h\x01" + text("b") + b"h\x01u"
        made += b"q\x010" + module(modules=both)
    return made


def within_itself() -> bytes:
    return b"}q\x020" + module(modules=b"h\x02") + b"q\x01h\x02" + text("a") + b"h\x01s0"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


TENSOR, STORAGE = name("torch._utils", "_rebuild_tensor_v2"), name("torch.storage", "_load_from_bytes")
BYTEARRAY = call(name("builtins", "bytearray"), b"J" + struct.pack("<i", 2**31 - 1))


def stored(count: float = 4) -> bytes:
    """A storage of numbers as torch.save writes it."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.arange(float(count)).storage(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def storage(pickled: bytes) -> bytes:
    return call(STORAGE, blob(pickled))


def inflated() -> bytes:
    """An archive of 0.2 MB that says that it is 200 MB long."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(200 << 20))
        archive.writestr("archive/data.pkl", b"\x80\x02" + BYTEARRAY + b".")
    return file.getvalue()


def rebuilt(stored: bytes, offset: bytes = b"K\x00", size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85") -> bytes:
    """A tensor of a storage."""
    return call(TENSOR, stored, offset, size, stride, b"\x89", b"}")


def tensor(**shape: bytes) -> bytes:
    return rebuilt(storage(STORED), **shape)


def of(stored: bytes | None = None, **shape: bytes) -> bytes:
    """A module with one tensor."""
    return module(parameters=entry(text("a"), rebuilt(storage(STORED) if stored is None else stored, **shape)))


def integer(bits: int) -> bytes:
    size = bits // 8 + 1
    return b"\x8b" + struct.pack("<i", size) + (1 << bits).to_bytes(size, "little")


STORED = stored()
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"  # renames the window, clears the screen, writes backwards
NESTED_MEMO = b"\x80\x02Nr\xff\xff\xff\x07."  # 2.1 GB of places for one object
ARRAY = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85" + blob(b"b") + b"\x87R"
DTYPE = call(name("numpy", "dtype"), text("f8"))


def array(shape: bytes, dtype: bytes = DTYPE) -> bytes:
    return ARRAY + b"(K\x01" + shape + dtype + b"\x89" + blob(bytes(16)) + b"tb"


# by name: the pickle behind its protocol, and what must be said about it; None where reading it costs nothing
HOSTILE: dict[str, tuple[bytes, str | None]] = {
    "memo index": (NESTED_MEMO[2:-1], None),
    "length of bytes": (b"\x8e" + struct.pack("<Q", 2**40) + b"a", "no sound pickle"),
    "length of a bytearray": (b"\x96" + struct.pack("<Q", 2**40) + b"a", "no sound pickle"),
    "length of a frame": (b"\x95" + struct.pack("<Q", 2**40) + b"N", None),
    "bytearray": (BYTEARRAY, "asks for 'builtins.bytearray'"),
    "bytes": (call(name("builtins", "bytes"), b"J" + struct.pack("<i", 2**31 - 1)), None),
    "many objects": (b"]" * 200_000, "more than 120000 objects and steps"),
    "as many sets as may be": (b"\x8f" * 119_990, None),
    "shared tuples": (doubled(), None),
    "shared lists": (b"]" + b"".join(b"q\x010](h\x01h\x01e" for _ in range(SEQUENCE)), None),
    "nested lists": (nested(50_000), None),
    "within itself": (b"}q\x01" + text("a") + b"h\x01s", None),
    "shared tuples as a key": (entry(doubled(), b"N"), "a key of a dictionary"),
    "shared tuples as a key of what is made at once": (b"(" + doubled() + b"Nd", "an opcode that nothing"),
    "shared tuples in a set": (b"\x8f(" + doubled() + b"\x90", "a member of a set"),
    "shared tuples in a frozen set": (b"(" + doubled() + b"\x91", "an opcode that nothing"),
    "keys of one hash": (b"}(" + b"".join(integer(61 * 7) + b"N" for _ in range(10)) + b"u", "a key of a dictionary"),
    "a call of many arguments, often": (
        b"(" + b"K\x01" * 50_000 + b"tq\x010" + (name("torch", "a") + b"h\x01R0") * 9_000 + b"N", None
    ),
    "a call of what is no function": (b"}" + b")R", "that is no function"),
    "one text encoded often": (
        text("a" * 1_000_000) + b"q\x010](" + call(name("_codecs", "encode"), b"h\x01", text("latin1")) * 4000 + b"e",
        None,
    ),
    "shared tuples outside": (doubled() + b"Q", "outside of it"),
    "a long number as text": (b"L" + b"9" * 100_000 + b"L\n", "no sound pickle"),
    "an escape sequence as a class": (name("os", "a").replace(b"a", b"\x1b[2J"), r"asks for 'os.\x1b[2J'"),
    "a class with a long name": (text("os") + text("a" * 1_000_000) + b"\x93", "'os.aaa"),
    "through a package": (text("torch") + text("os.system") + b"\x93" + text("true") + b"\x85R", "torch.os.system"),
    "an old instance": (b"(ios\nsystem\n", "an opcode that nothing"),
    "an empty stack": (b"a", "no sound pickle"),
}  # fmt: skip

# of modules: the pickle, and what read_released must say
HOSTILE_MODULES: dict[str, tuple[bytes, str | None]] = {
    "shared children": (shared_modules(60), "a module within itself, or too many"),
    "within itself": (within_itself(), "a module within itself"),
    "nested deep": (shared_modules(2000), "a module within itself, or"),
    "a tensor's name that is no text": (module(parameters=entry(b"N", tensor())), "None is a name that is no text"),
    "a long name": (module(parameters=entry(text("a" * 1000), tensor())), "or too long a name"),
    "an escape sequence as a module": (name("torch", ESCAPE.partition("\u202e")[0]) + b")\x81", r"torch.\x1b]0;owned"),
    "a dictionary made at once": (call(name("collections", "OrderedDict"), b"](" + doubled() + b"N\x86e"), "a module"),
    "a storage's memo": (of(storage(NESTED_MEMO)), "damaged storage"),
    "a storage that is a bytearray": (of(storage(b"\x80\x02" + BYTEARRAY + b".")), "asks for 'builtins.bytearray'"),
    "an inflated archive": (of(storage(inflated())), "an archive where a storage belongs"),
    "a storage that is cut": (of(storage(STORED[:-4])), "a damaged storage: 4 numbers in 12 bytes"),
    "a storage of a lie": (of(storage(STORED.replace(b"K\x04N", b"J\xff\xff\xff\x7fN"))), "a damaged storage"),
    "shared tuples as reference": (of(storage(STORED.replace(b"Q", doubled() + b"Q", 1))), "where a storage belongs"),
    "one storage read often": (
        text(stored(1e6).decode("latin1")) + b"q\x010" + module(parameters=b"}(" + b"".join(
            text(f"p{i}") + rebuilt(call(STORAGE, call(name("_codecs", "encode"), b"h\x01", text("latin1"))))
            for i in range(4000)
        ) + b"u"), "larger than the file",
    ),
    "reaching beyond its storage": (of(size=b"K\x05\x85"), "beyond its storage"),
    "one number a thousand times": (of(size=b"M\xe8\x03\x85", stride=b"K\x00\x85"), "beyond its storage"),
    "a negative size": (of(size=b"J\xff\xff\xff\xff\x85"), "is none"),
    "shared tuples as size": (of(size=doubled()), "is none"),
    "shared tuples as offset": (of(offset=doubled()), "is no tensor"),
    "a large integer as size": (of(size=integer(500) + b"\x85"), "is none"),
}  # fmt: skip

# of arrays: the pickle, and what to_array must say
HOSTILE_ARRAYS: dict[str, tuple[bytes, str | None]] = {
    "shared tuples as dtype": (array(b"K\x02\x85", call(name("numpy", "dtype"), doubled())), "than plain numbers"),
    "objects": (array(b"K\x02\x85", call(name("numpy", "dtype"), text("O8"))), "than plain numbers"),
    "shared tuples as shape": (array(doubled()), "a damaged array"),
    "a large integer as shape": (array(integer(500) + b"\x85"), "a damaged array"),
    "a shape that does not fit": (array(b"J\xff\xff\xff\x7f\x85"), "a damaged array"),
    "a call": (call(name("numpy", "zeros"), b"J" + struct.pack("<i", 2**31 - 1)), "where an array belongs"),
}  # fmt: skip

READERS: dict[str, tuple[dict[str, tuple[bytes, str | None]], Callable[[Path], object]]] = {
    "any": (HOSTILE, read_pickle),
    "modules": (HOSTILE_MODULES, read_released),
    "arrays": (HOSTILE_ARRAYS, lambda path: to_array(read_pickle(path))),
}
