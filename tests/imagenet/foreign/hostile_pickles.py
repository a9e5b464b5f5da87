"""Small pickles that ask for much memory, much time, or the terminal; and what reading them costs.

python -m tests.imagenet.foreign.hostile_pickles FOLDER        a line of JSON: seconds by name, and growth in memory
"""

import contextlib
import io
import json
import resource
import struct
import sys
import time
import warnings
import zipfile
from pathlib import Path

import torch

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
    state = b"(" + text("_parameters") + parameters + text("_buffers") + b"}" + text("_modules") + modules + b"d"
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


def stored() -> bytes:
    """A storage of four numbers as torch.save writes it."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"):
        torch.save(torch.arange(4.0).storage(), file, _use_new_zipfile_serialization=False)
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


def tensor(offset: bytes = b"K\x00", size: bytes = b"K\x02\x85", stride: bytes = b"K\x01\x85") -> bytes:
    return call(TENSOR, storage(STORED), offset, size, stride, b"\x89", b"}")


def integer(bits: int) -> bytes:
    size = bits // 8 + 1
    return b"\x8b" + struct.pack("<i", size) + (1 << bits).to_bytes(size, "little")


STORED = stored()
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e"  # renames the window, clears the screen, writes backwards
NESTED_MEMO = b"\x80\x02Nr\xff\xff\xff\x07."  # 2.1 GB of places for one object
ARRAY = name("numpy.core.multiarray", "_reconstruct") + name("numpy", "ndarray") + b"K\x00\x85" + blob(b"b") + b"\x87R"
DTYPE = call(name("numpy", "dtype"), text("f8"))


def array(shape: bytes) -> bytes:
    return ARRAY + b"(K\x01" + shape + DTYPE + b"\x89" + blob(bytes(16)) + b"tb"


# by name: the pickle behind its protocol, and a part of what must be said about it by both readers
HOSTILE: dict[str, tuple[bytes, str]] = {
    "memo index": (NESTED_MEMO[2:-1], "into place 134217727 of its memo"),
    "memo index as text": (b"Np134217727\n", "of its memo"),
    "negative memo index": (b"Np-5\n", "of its memo"),
    "memo of nothing": (b"p1\n", "no sound pickle"),
    "length of bytes": (b"\x8e" + struct.pack("<Q", 2**40) + b"a", "bytes follow where"),
    "length of text": (b"\x8d" + struct.pack("<Q", 2**62) + b"a", "bytes follow where"),
    "length of a bytearray": (b"\x96" + struct.pack("<Q", 2**40) + b"a", "bytes follow where"),
    "length of a frame": (b"\x95" + struct.pack("<Q", 2**40) + b"N", "bytes follow where"),
    "bytearray": (BYTEARRAY, "asks for builtins.bytearray"),
    "bytes": (call(name("builtins", "bytes"), b"J" + struct.pack("<i", 2**31 - 1)), "asks for builtins.bytes"),
    "many objects": (b"]" * 200_000, "more than 120000 objects and steps"),
    "many sets": (b"\x8f" * 200_000, "more than 120000 objects and steps"),
    "shared tuples as a key": (entry(doubled(), b"N"), "a key of a dictionary"),
    "shared tuples as keys": (b"}(" + doubled() + b"Nu", "a key of a dictionary"),
    "shared tuples as a key of what is made at once": (b"(" + doubled() + b"Nd", "a key of a dictionary"),
    "shared tuples in a set": (b"\x8f(" + doubled() + b"\x90", "a member of a set"),
    "shared tuples in a frozen set": (b"(" + doubled() + b"\x91", "a member of a set"),
    "nested tuples as a key": (entry(b")" + b"\x85" * 100_000, b"N"), "a key of a dictionary"),
    "shared tuples outside": (doubled() + b"Q", "outside of it"),
    "an escape sequence outside": (b"P" + ESCAPE[:-1].encode() + b"\n", "outside of it"),
    "keys of one hash": (
        b"}(" + b"".join(integer(61 * 7) + b"N" for _ in range(10)) + b"u", "a key of a dictionary"
    ),
    "a huge integer": (integer(8_000_000), "an integer of 8000001 bits"),
    "a huge integer as a key": (entry(integer(8_000_000), b"N"), "an integer of 8000001 bits"),
    "a long number as text": (b"L" + b"9" * 100_000 + b"L\n", "no sound pickle"),
    "an escape sequence as a class": (name("os", "a").replace(b"a", b"\x1b[2J"), r"asks for os.\x1b[2J"),
    "an escape sequence as a class, by stack": (text("os") + text(ESCAPE) + b"\x93", r"asks for os.\x1b]0;owned\x07"),
    "a class with a long name": (text("os") + text("a" * 1_000_000) + b"\x93", "aaa..."),
    "an old instance": (b"(ios\nsystem\n", "the opcode INST"),
    "an old object": (b"(" + name("os", "system") + b"o", "the opcode OBJ"),
    "an extension": (b"\x82\x01", "the opcode EXT1"),
    "an empty stack": (b"a", "no sound pickle"),
    "a mark for an object": (b"((a", "no sound pickle"),
    "a mark that is not there": (b"Nt", "no sound pickle"),
}  # fmt: skip

# of modules: the pickle, and what read_module or tensors_of must say
HOSTILE_MODULES: dict[str, tuple[bytes, str]] = {
    "shared children": (shared_modules(60), "a module within itself, or more than"),
    "within itself": (within_itself(), "a module within itself"),
    "nested deep": (shared_modules(2000), "a module within itself, or"),
    "modules in lists": (module(modules=nested(50_000)), "is not a module"),
    "names that are no text": (module(modules=entry(b"K\x05", module())), "5 is a name that is no text"),
    "a tensor's name that is no text": (module(parameters=entry(b"N", tensor())), "None is a name that is no text"),
    "a long name": (module(parameters=entry(text("a" * 1000), tensor())), "a name of more than 500 letters"),
    "an escape sequence as a module": (name("torch", ESCAPE.partition("\u202e")[0]) + b")\x81", r"torch.\x1b]0;owned"),
    "items replaced": (
        module(modules=name("collections", "OrderedDict") + b")R" + entry(text("items"), b"K\x05") + b"b")
        + b"0" + module(modules=entry(text("a"), b"K\x05")), "int is not a module",
    ),
    "a dictionary made at once": (call(name("collections", "OrderedDict"), b"](" + doubled() + b"N\x86e"), "at once"),
    "many classes": (b"".join(name("torch", f"a{i}") + b"0" for i in range(1001)) + b"N", "more than 1000 classes"),
    "a storage's memo": (storage(NESTED_MEMO), "of its memo"),
    "a storage that is a bytearray": (storage(b"\x80\x02" + BYTEARRAY + b"."), "asks for builtins.bytearray"),
    "an inflated archive": (storage(inflated()), "an archive where a storage belongs"),
    "a storage of no bytes": (call(STORAGE, doubled()), "something else where a storage belongs"),
    "a storage that is cut": (storage(STORED[:-4]), "a damaged storage: 4 numbers in 12 bytes"),
    "a storage of a lie": (storage(STORED.replace(b"K\x04N", b"J\xff\xff\xff\x7fN")), "a damaged storage"),
    "shared tuples as reference": (storage(STORED.replace(b"Q", doubled() + b"Q", 1)), "no storage"),
    "shared tuples as size": (tensor(size=doubled()), "is none"),
    "shared tuples as stride": (tensor(stride=doubled()), "is none"),
    "shared tuples as offset": (tensor(offset=doubled()), "is none"),
    "a long size": (tensor(size=b"(" + b"K\x01" * 50_000 + b"t"), "is none"),
    "a large integer as size": (tensor(size=integer(500) + b"\x85"), "is none"),
    "a tensor of a text": (call(TENSOR, text("a"), b"K\x00", b")", b")"), "something else than a storage"),
    "a tensor that is changed": (tensor() + b"(" + tensor() + b"K\x00K\x02\x85K\x01\x85tb", "changes a parameter"),
    "shared tuples as encoding": (call(name("_codecs", "encode"), text("a"), doubled()), "another encoding"),
}  # fmt: skip

# of arrays: the pickle, and what read_arrays must say; None where it may be read
HOSTILE_ARRAYS: dict[str, tuple[bytes, str | None]] = {
    "shared tuples": (doubled(), None),
    "shared lists": (b"]" + b"".join(b"q\x010](h\x01h\x01e" for _ in range(SEQUENCE)), None),
    "as many sets as may be": (b"\x8f" * 119_990, None),
    "nested lists": (nested(50_000), "too deep"),
    "shared tuples as dtype": (call(name("numpy", "dtype"), doubled()), "an array of dtype 'tuple'"),
    "an escape sequence as dtype": (call(name("numpy", "dtype"), text(ESCAPE)), r"an array of dtype '\x1b]0;owned"),
    "shared tuples as shape": (array(doubled()), "something else than plain numbers"),
    "a large integer as shape": (array(integer(500) + b"\x85"), "something else than plain numbers"),
    "a shape that does not fit": (array(b"J\xff\xff\xff\x7f\x85"), "a damaged array"),
    "one text encoded often": (
        text("a" * 1_000_000) + b"q\x010](" + call(name("_codecs", "encode"), b"h\x01", text("latin1")) * 4000 + b"e",
        None,
    ),
}  # fmt: skip


def write(folder: Path) -> None:
    """The pickles as files, a folder for each reader."""
    for kind, cases in (("any", HOSTILE), ("modules", HOSTILE_MODULES), ("arrays", HOSTILE_ARRAYS)):
        (folder / kind).mkdir()
        for title, (data, _) in cases.items():
            (folder / kind / f"{title}.pkl").write_bytes(b"\x80\x02" + data + b".")


def measure(folder: Path) -> tuple[dict[str, float], int]:
    """Seconds of computing by file, and by how many bytes the process grew from all of them."""
    from imagenet.foreign.pickled_arrays import read_arrays
    from imagenet.foreign.pickled_tensors import read_module, tensors_of

    seconds, before = {}, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for path in sorted(folder.glob("*/*.pkl")):
        for read in (lambda path: tensors_of(read_module(path)), read_arrays):
            begun = time.process_time()
            with contextlib.suppress(ValueError):
                read(path)
            took = time.process_time() - begun
            seconds[path.stem] = max(took, seconds.get(path.stem, 0.0))
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds, unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
