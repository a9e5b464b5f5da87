"""The type checker behind `pytest --check-shapes`: an int may stand for a float, any file for a text stream."""

from typing import TextIO

from beartype import BeartypeConf, FrozenDict, beartype

checker = beartype(conf=BeartypeConf(is_pep484_tower=True, hint_overrides=FrozenDict({TextIO: object})))
