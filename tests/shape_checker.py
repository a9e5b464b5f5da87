"""The type checker behind `pytest --check-shapes`.

What a type checker of programs lets pass, passes: an int for a float, any file for a stream; so does a list for a tuple
of floats, as a command line and JSON have them.
"""

from collections.abc import Sequence
from typing import IO, BinaryIO, TextIO

from beartype import BeartypeConf, FrozenDict, beartype

LOOSER = FrozenDict(
    {TextIO: object, BinaryIO: object, IO[bytes]: object, tuple[float, ...]: Sequence[float]}  # type: ignore[dict-item]
)
checker = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=LOOSER))
