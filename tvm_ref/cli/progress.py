"""Progress: a tqdm bar on a terminal, and elsewhere, as in a log file, a line every half minute."""

import sys
from typing import Any

from tqdm import tqdm

LOG_INTERVAL = 30.0  # seconds between lines where there is no terminal
LINE = "{l_bar}{bar:20}{r_bar}"


def progress(*arguments: Any, **options: Any) -> tqdm:
    """Make a tqdm bar with its arguments and options, on standard error unless said otherwise.

    Without a terminal it prints lines; a temporary bar (leave=False) prints none.
    """
    options["file"] = file = options.get("file") or sys.stderr
    if not file.isatty():
        lines = {"mininterval": LOG_INTERVAL, "bar_format": options.get("bar_format", LINE) + "\n", "ascii": True}
        options |= lines | {"disable": options.get("disable", False) or not options.get("leave", True)}
    return tqdm(*arguments, **options)
