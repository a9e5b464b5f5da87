"""The type checker behind `pytest --check-shapes`.

What a type checker of programs lets pass, passes: an int for a float, any file for a stream, a method's `Self`; a list
for a tuple of floats, too, as a command line and JSON have them.
"""

from collections.abc import Sequence
from typing import IO, BinaryIO, Self, TextIO

from beartype import BeartypeConf, FrozenDict, beartype

LOOSER = FrozenDict(
    {TextIO: object, BinaryIO: object, IO[bytes]: object, Self: object, tuple[float, ...]: Sequence[float]}  # type: ignore[dict-item]
)
checker = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=LOOSER))
