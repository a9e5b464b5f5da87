"""Folders and files that commands write: never over something else, and never half."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import UserError, require, user_files


def require_free(out: Path, marks: Sequence[str], what: str = "a run", ways: str = "", overwrite: bool = False) -> None:
    """Raise UserError unless results may be written into the folder `out`, which need not exist yet.

    Args:
        out: must be new, empty, or hold earlier results that `overwrite` gives up.
        marks: names of files; a folder with all of them holds earlier results.
        what: these results are.
        ways: options that would do, for the message, as "--resume, --overwrite".
        overwrite: whether earlier results may be replaced.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())  # where it is, or will be made
    require(place.is_dir(), f"{place} is a file, not a folder")
    require(os.access(place, os.W_OK), f"{place} cannot be written to: choose another --out")
    if place != out or not any(out.iterdir()):
        return
    held = all((out / mark).is_file() for mark in marks)
    require(held, f"{out} holds something that is not {what}: choose another --out")
    require(overwrite, f"{out} already holds {what}: {ways + ', or' if ways else 'choose'} another --out")


def require_new(out: Path | None) -> None:
    """Raise UserError unless the file `out` can be made, and is not there yet; makes its folder. None is no file."""
    if out is not None:
        if out.exists():
            raise UserError(f"{out} exists already; choose another --out")
        require_free(out, ())
        with user_files():
            out.parent.mkdir(parents=True, exist_ok=True)


def require_suffix(path: Path, suffix: str) -> None:
    """Raise UserError unless a file that is to be written, and may be there, is named as its kind is."""
    require(path.suffix.lower() == suffix, f"--out {path}: the file to write must end in {suffix}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def read_json(path: Path, what: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read an object of JSON that a command wrote earlier.

    Args:
        path: the file.
        what: it describes, for the message.
        keys: that it must have.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # no JSON, or no text
        stored = None
    if not isinstance(stored, dict) or not all(key in stored for key in keys):
        raise UserError(f"{path} is damaged: it does not describe a {what}")
    return stored
