"""Look through a pickle before anything of it is built, and refuse what could cost more than its file's size tells.

A pickle of a few bytes can ask for gigabytes (a number in the memo, a length), and one of a few hundred for more time
than there is (a tuple of tuples that are shared, as the key of a dictionary: its hash takes 2^n steps). The opcodes say
all of it, and reading them builds nothing.
"""

import pickletools
from typing import Any, BinaryIO

from tvm_ref.cli.errors import UserError

MAX_OPCODES = 120_000  # two networks of 28 blocks, with what torch.compile puts around them, have 49,000
MAX_INTEGER_BITS = 512  # longer ones make arithmetic slow, and none is needed
MAX_KEY_BITS = 60  # integers beyond share hashes, by which a dictionary becomes a list to search
OUTSIDE = {"PERSID", "BINPERSID"}  # references to something beside the file
REFUSED = {"EXT1", "EXT2", "EXT4", "INST", "OBJ", "NEXT_BUFFER", "READONLY_BUFFER"}
PUT, GET = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}, {"GET", "BINGET", "LONG_BINGET"}
ATOMS = (
    pickletools.pyint, pickletools.pylong, pickletools.pyinteger_or_bool, pickletools.pybool, pickletools.pyfloat,
    pickletools.pybytes_or_str, pickletools.pybytes, pickletools.pyunicode, pickletools.pynone,
)  # fmt: skip
SHOWN = 80  # letters of a name that are printed
BAR = 2**20  # bytes between movements of a progress bar


class Refused(UserError):
    """A pickle asks for something that its readers do not give."""


def shown(text: str, letters: int = SHOWN) -> str:
    """Shorten a text out of a file, and escape what would steer the terminal that it is printed on."""
    text = repr(text[: letters + 1])[1:-1]
    return text if len(text) <= letters else f"{text[:letters]}..."


class Bounded:
    """A file, as far as an unpickler needs one, that never reads more than there is.

    Args:
        stream: the file.
        size: bytes that are left in it.
        bar: a progress bar, or None.
    """

    def __init__(self, stream: BinaryIO, size: int, bar: Any = None):
        self._stream, self._left, self._bar = stream, size, bar
        self._shown = size  # bytes that were left when the bar moved last

    def read(self, n: int) -> bytes:
        """Read the next n bytes.

        Raises:
            ValueError: fewer are left.
        """
        if n > self._left:
            raise ValueError(f"it says that {n} bytes follow where {self._left} do")
        return self._counted(self._stream.read(n))

    def readline(self) -> bytes:
        """Read the next line."""
        return self._counted(self._stream.readline())

    def _counted(self, data: bytes) -> bytes:
        """Count bytes that were read."""
        self._left -= len(data)
        if self._bar is not None and self._shown - self._left >= BAR:
            self._bar.update(self._shown - self._left)
            self._shown = self._left
        return data


def scan(stream: Bounded, *, outside: bool = False) -> None:
    """Read a pickle's opcodes to its end.

    Keys and members of sets must be numbers or strings: others, tuples above all, are hashed through all that they
    hold. Everything else that nests is left to those who walk through the result.

    Args:
        stream: at the pickle's beginning; left behind its end.
        outside: references to something outside of it are in order.

    Raises:
        Refused: an opcode that nothing here needs, too many of them, a memo or an integer beyond bounds, a bad key.
        ValueError: it is no pickle.
    """
    stack: list[bool | None] = []  # of each object whether it may be a key; None for a mark
    memo: dict[int, bool | None] = {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(stream), 1):  # type: ignore[arg-type]
        name = opcode.name
        _check_opcode(name, argument, count, outside)
        if name in PUT:
            index: int = len(memo) if name == "MEMOIZE" else argument  # type: ignore[assignment]
            if not 0 <= index <= count:
                raise Refused(f"it puts its object number {count} at most into place {index} of its memo")
            memo[index] = stack[-1] if stack else False
        elif name in GET:
            if argument not in memo:
                raise ValueError(f"its memo has nothing in place {argument}")
            stack.append(memo[argument])
        elif name == "DUP":
            stack.extend(stack[-1:])
        else:
            below, above = _taken(stack, opcode)
            _check_keys(name, below, above)
            small = not isinstance(argument, int) or argument.bit_length() <= MAX_KEY_BITS
            for pushed in opcode.stack_after:
                stack.append(None if pushed is pickletools.markobject else pushed in ATOMS and small)


def _check_opcode(name: str, argument: object, count: int, outside: bool) -> None:
    """Refuse an opcode that nothing here needs, or one too many."""
    if count > MAX_OPCODES:
        raise Refused(f"it is made of more than {MAX_OPCODES} objects and steps")
    if name in OUTSIDE and not outside:
        raise Refused("it refers to something outside of it")
    if name in REFUSED:
        raise Refused(f"it uses the opcode {name}, which nothing that is read here needs")
    if isinstance(argument, int) and argument.bit_length() > MAX_INTEGER_BITS:
        raise Refused(f"it holds an integer of {argument.bit_length()} bits")


def _taken(stack: list[bool | None], opcode: pickletools.OpcodeInfo) -> tuple[list[bool | None], list[bool | None]]:
    """Take off the stack what an opcode takes: some objects, and those above the last mark if it says so."""
    fixed, above = opcode.stack_before, []
    if pickletools.markobject in fixed:
        fixed = fixed[: fixed.index(pickletools.markobject)]
        while stack and stack[-1] is not None:
            above.append(stack.pop())
        if not stack:
            raise ValueError("an opcode misses its mark")
        stack.pop()
    if len(stack) < len(fixed):
        raise ValueError("an opcode misses its objects")
    start = len(stack) - len(fixed)
    below = stack[start:]
    del stack[start:]
    if None in below and opcode.name != "POP":
        raise ValueError("an opcode takes a mark for an object")
    return below, above[::-1]


def _check_keys(name: str, below: list[bool | None], above: list[bool | None]) -> None:
    """Refuse keys and members of sets that are neither numbers nor strings."""
    keys = {"SETITEM": below[1:2], "SETITEMS": above[::2], "DICT": above[::2], "ADDITEMS": above, "FROZENSET": above}
    if not all(keys.get(name, ())):
        raise Refused("it has a key of a dictionary, or a member of a set, that is neither a number nor a string")
