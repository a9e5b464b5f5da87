"""What the commands share: options from a dataclass, one-line errors, files that are whole, a Ctrl-C that waits."""

import argparse
import dataclasses
import os
import signal
import sys
from dataclasses import field
from pathlib import Path
from typing import Any, NoReturn


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """A field of a configuration: its default, the reason for it, and what argparse must know of it.

    `resume` is for the program: whether a run may be resumed with another value.
    """
    return field(default=default, metadata={"help": help, **argparse_options})


def flag(name: str) -> str:
    """The command-line option of a field."""
    return "--" + name.replace("_", "-")


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming the option, for a value below `least` or NaN."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{flag(name)} must be at least {least}, got {value}")


class OneLineParser(argparse.ArgumentParser):
    """Errors in one line, exit status 2. Of many processes under torchrun the first one speaks."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and where help is, and exit."""
        if os.environ.get("RANK", "0") == "0":
            print(f"{self.prog}: error: {message} (--help lists all options)", file=sys.stderr)
        sys.exit(2)


def add_options(parser: argparse._ActionsContainer, config: type, only: list[str] | None = None) -> None:
    """Add an option per field of a dataclass, or per field in `only`. Options not given stay absent when parsed."""
    for f in dataclasses.fields(config):
        if only is not None and f.name not in only:
            continue
        options = dict(f.metadata)
        text = options.pop("help")
        options.pop("resume", None)
        if isinstance(f.default, bool):
            options.setdefault("action", "store_true")
            if options["action"] is argparse.BooleanOptionalAction:
                text += f" (default: {'yes' if f.default else 'no'})"
        elif f.default is not None:
            text += f" (default: {f.default})"
            options.setdefault("metavar", None if "choices" in options else f.name.upper().split("_")[-1])
        options = {k: v for k, v in options.items() if v is not None}
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text.replace("%", "%%"), **options)


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that a reader, or a crash, sees the old text or the new one and nothing between."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    os.replace(partial, path)


class Interruption:
    """Ctrl-C or SIGTERM, noted instead of raised, so that the step under way is finished. A second one is raised."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, *_: Any) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def __exit__(self, *_: Any) -> None:
        self._restore()
