"""Progress over the parts of measuring and drawing."""

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tvm_ref.cli.progress import progress


class Parts:
    """A progress bar over the parts of measuring and drawing, which names what is under way."""

    def __init__(self, total: int):
        form = "measuring and drawing: {percentage:3.0f}%|{bar}| {elapsed} {desc}"
        self._bar = progress(total=total, file=sys.stdout, mininterval=0.1, bar_format=form)

    def of(self, parts: Iterable[Any], name: str) -> Iterator[Any]:
        """Go through some parts."""
        for part in parts:
            self._bar.set_description_str(name)
            yield part
            self._bar.update()

    def __enter__(self) -> "Parts":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.set_description_str("")
        self._bar.close()
