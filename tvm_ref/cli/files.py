"""Write folders and files without overwriting anything else and without leaving half-written files."""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tvm_ref.cli.errors import UserError, require, user_files

LOCK = "lock"  # says which process writes into a folder


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a folder if needed, and lock it against other processes.

    The system's lock on the file LOCK ends with the process, however it ends. A file left by a killed one is reported.

    Raises:
        UserError: another process holds it, or it cannot be written to.
    """
    import fcntl  # not on Windows, where models are loaded and pages made without it

    _require_writable(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with user_files():
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    with file:
        file.seek(0)
        holder = file.read()
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"{folder} is in use by {holder}; if it has ended, remove {folder / LOCK}") from None
        except OSError as error:  # a file system without locks
            print(f"warning: {folder / LOCK} holds off nobody: {error.strerror}")
        else:
            if holder:
                print(f"{holder} left {folder / LOCK} when it was killed: taking over")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for path in made:
                    path.rmdir()


def _require_writable(out: Path) -> Path:
    """Raise UserError unless a folder can be written to, or made; return the part of its path that exists."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    require(place.is_dir(), f"{place} is a file, not a folder")
    require(os.access(place, os.W_OK), f"{place} cannot be written to: choose another --out")
    return place


def require_free(
    out: Path,
    marks: Sequence[str],
    what: str = "a run",
    ways: str = "",
    overwrite: bool = False,
    leftovers: Sequence[str] = (),
) -> None:
    """Raise UserError unless results may be written into the folder `out`, which need not exist yet.

    Args:
        out: must be new, empty, or hold earlier results that `overwrite` may replace; a lock does not count.
        marks: names of files; a folder with all of them holds earlier results.
        what: what the results are, for the message, such as "a run".
        ways: options to suggest in the message, such as "--resume, --overwrite".
        overwrite: whether earlier results may be replaced.
        leftovers: names of other files that do not count.
    """
    place = _require_writable(out)
    if place != out or all(path.name in (LOCK, *leftovers) for path in out.iterdir()):
        return
    held = all((out / mark).is_file() for mark in marks)
    require(held, f"{out} holds something that is not {what}: choose another --out")
    require(overwrite, f"{out} already holds {what}: {ways + ', or' if ways else 'choose'} another --out")


def require_new(out: Path | None) -> None:
    """Raise UserError unless the file `out` is new and can be made; make its folder. None means no file."""
    if out is not None:
        if out.exists():
            raise UserError(f"{out} exists already; choose another --out")
        require_free(out, ())
        with user_files():
            out.parent.mkdir(parents=True, exist_ok=True)


def require_suffix(path: Path, suffix: str) -> None:
    """Raise UserError unless the file to write, which may exist, has the right suffix."""
    require(path.suffix.lower() == suffix, f"--out {path}: the file to write must end in {suffix}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees either the old content or the new, never a mixture."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)


def find(given: str | Path, shipped: Iterable[Path]) -> Path:
    """Return a path that exists, or else the one of that name among the models that come with this package.

    Args:
        given: a path, or a name.
        shipped: files or folders, each named after its model.

    Raises:
        UserError: neither is there; says which names there are.
    """
    path, known = Path(given), {model.stem: model for model in shipped}
    if path.exists() or path.is_symlink():
        return path
    names = ", ".join(sorted(known))
    require(str(given) in known, f"{given} cannot be read: nothing is there; models that come along: {names}")
    return known[str(given)]


def read_json(path: Path, what: str, keys: Sequence[str] = ()) -> dict[str, Any]:
    """Read a JSON object that a command wrote earlier.

    Args:
        path: the file.
        what: what it describes, for the message.
        keys: keys that it must have.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        stored = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # not JSON, or not text
        stored = None
    if not isinstance(stored, dict) or not all(key in stored for key in keys):
        raise UserError(f"{path} is damaged: it does not describe a {what}")
    return stored
