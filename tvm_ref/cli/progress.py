"""Progress bars that a log file bears: redrawn on a terminal, a few plain lines elsewhere."""

import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

FIRST = 5.0  # seconds until a log's first line; each later one comes after twice the time ...
LONGEST = 60.0  # ... but no later than so many seconds after the one before, so that a log never looks dead


class Lines:
    """What tqdm draws on where there is no terminal: some of its redraws become lines, and the last one does.

    Args:
        file: where lines go.
    """

    def __init__(self, file: TextIO):
        self._file = file
        self._begun = time.monotonic()
        self._next = FIRST
        self._pending = ""

    def write(self, text: str) -> None:
        """Take a redraw, which begins with a carriage return, or the line's end once the bar is closed."""
        if drawn := text.strip():
            self._pending = drawn
        elapsed = time.monotonic() - self._begun
        due = elapsed >= self._next and "100%" not in self._pending  # which is the last line, and comes at the end
        if self._pending and (due or text.endswith("\n")):
            self._file.write(self._pending + "\n")
            self._file.flush()
            self._pending = ""
            now = max(self._next, elapsed)
            self._next = now + min(now, LONGEST)

    def flush(self) -> None:
        """Do nothing: lines are flushed as they are written."""


class Bar(tqdm):
    """tqdm for fractions, too, which add up to a little more than the total: they are drawn as the total."""

    @staticmethod
    def format_meter(n: float, total: float | None, *arguments: Any, **options: Any) -> str:
        """Draw the bar; from half a unit beyond the total on, tqdm itself takes the total for unknown."""
        if total is not None and total < n < total + 0.5:
            n = total
        return tqdm.format_meter(n, total, *arguments, **options)


def progress(*arguments: Any, file: TextIO | None = None, **options: Any) -> Bar:
    """Make a tqdm bar with its arguments and options, on standard error unless said otherwise."""
    file = sys.stderr if file is None else file
    return Bar(*arguments, file=file if file.isatty() else Lines(file), **options)
