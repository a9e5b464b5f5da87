"""The one way into every command: options from a dataclass, errors of one line, free folders, a quiet Ctrl-C."""

import argparse
import contextlib
import dataclasses
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tvm_ref.cli.stopping import INTERRUPTED, is_first_rank, leave_at_once, raise_again


class OneLineParser(argparse.ArgumentParser):
    """A parser whose help keeps the description's lines and states defaults, and whose errors take one line.

    Of many processes under torchrun the first one speaks.
    """

    def __init__(self, prog: str, description: str | None = None, **options: Any):
        defaults: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(prog, description=description, **defaults | options)

    def error(self, message: str) -> NoReturn:
        """Print `message` and where help is, and exit with status 2."""
        self._end(f"error: {message} (--help lists all options)", 2)

    @contextlib.contextmanager
    def bad_input(self) -> Iterator[None]:
        """Turn what bad options and files raise into `error` (a network beyond the memory is a RuntimeError)."""
        try:
            yield
        except (ValueError, OSError, MemoryError, RuntimeError) as error:
            line = first_line(error)
            if "--" in line:  # it is about an option
                self.error(line)
            self._end(f"error: {line}", 2)

    @contextlib.contextmanager
    def failures(self, hint: str = "") -> Iterator[None]:
        """End with one line and status 1 where work fails, and with status 130 where it is interrupted.

        Args:
            hint: how to go on afterwards; not said of numbers that are not finite (FloatingPointError), as they recur.
        """
        hint = hint and f"; {hint}"
        try:
            yield
        except KeyboardInterrupt:
            self._end(f"stopped{hint}", INTERRUPTED)
        except FloatingPointError as error:
            self._end(f"error: {first_line(error)}", 1)
        except (OSError, MemoryError, RuntimeError) as error:
            self._end(f"error: {first_line(error)}{hint}", 1)

    def _end(self, line: str, status: int) -> NoReturn:
        if is_first_rank():
            sys.stdout.flush()
            print(f"{self.prog}: {line}", file=sys.stderr, flush=True)
        sys.exit(status)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help and _with_default(action.help, action.default)


def _with_default(text: str, default: Any) -> str:
    """Add "(default: X)" to an option's help, unless the text speaks of it or there is none; False goes unsaid."""
    if "default" in text or default is None or default is False or default == argparse.SUPPRESS:
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{text} (default: {'yes' if default is True else shown.replace('%', '%%')})"


def first_line(error: BaseException) -> str:
    """Say in one line what went wrong; of a file, with its name."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; a Ctrl-C that it does not catch ends it in one line, with status 130."""
    raise_again()
    try:
        status = main()
    except KeyboardInterrupt:
        if is_first_rank():
            print("\nstopped", file=sys.stderr, flush=True)
        status = INTERRUPTED
    finally:
        leave_at_once()  # while Python itself ends
    sys.exit(status)


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """Make a field of a configuration from its default, the reason for it, and what its annotation does not say.

    `choices` are the keys of a registry; `resume` is for the program: whether a run may be resumed with another value.
    """
    return dataclasses.field(default=default, metadata={"help": help, **argparse_options})


def flag(name: str) -> str:
    """Return the command-line option of a field."""
    return "--" + name.replace("_", "-")


def kinds(config: type) -> dict[str, tuple[type, bool, tuple[str, ...] | None]]:
    """Return the type of each field of a dataclass, whether it may be None, and its choices, if they are listed.

    Of a field with one or more values (nargs "+" beside its annotation tuple[float, ...]) it is their type.
    """
    found, hints = {}, typing.get_type_hints(config)
    for f in dataclasses.fields(config):
        union = typing.get_args(hints[f.name]) if isinstance(hints[f.name], types.UnionType) else (hints[f.name],)
        (kind,) = (a for a in union if a is not types.NoneType)
        choices = f.metadata.get("choices")
        if typing.get_origin(kind) is tuple:  # one or more, tuple[float, ...]
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is typing.Literal:
            kind, choices = str, typing.get_args(kind)
        found[f.name] = (kind, types.NoneType in union, None if choices is None else tuple(choices))
    return found


def add_options(parser: argparse._ActionsContainer, config: type, only: Sequence[str] | None = None) -> None:
    """Add an option per field of a dataclass, or per field in `only`. Options not given stay absent when parsed."""
    for f in dataclasses.fields(config):
        if only is not None and f.name not in only:
            continue
        kind, _, choices = kinds(config)[f.name]
        options = {k: v for k, v in f.metadata.items() if k not in ("help", "resume")}
        if kind is bool:
            options.setdefault("action", argparse.BooleanOptionalAction if f.default else "store_true")
        elif choices is not None:
            options["choices"] = choices
        else:
            options = {"type": kind, "metavar": f.name.upper().split("_")[-1]} | options
        text = _with_default(f.metadata["help"].replace("%", "%%"), f.default)
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **options)


def given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """Return the fields of a dataclass that the command line gave, by name; several values as a tuple."""
    found = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(config) if hasattr(arguments, f.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def check_types(config: Any) -> None:
    """Raise ValueError, naming the option, for a field that is not what its annotation says, as a file may have it."""
    many = {f.name for f in dataclasses.fields(config) if f.metadata.get("nargs")}
    for name, (kind, optional, choices) in kinds(type(config)).items():
        value = getattr(config, name)
        if name in many and not (isinstance(value, tuple) and value):
            raise ValueError(f"{flag(name)} must be a list, and not empty; got {value!r:.80}")
        for item in value if name in many else (value,):
            if item is not None or not optional:
                _check_type(name, item, kind, choices)


def _check_type(name: str, value: Any, kind: type, choices: tuple[str, ...] | None) -> None:
    """Raise ValueError, naming the option, for a value that is of another kind, or none of the choices."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{flag(name)} must be {words.get(kind, kind.__name__)}, got {value!r:.80}")
    if choices is not None and value not in choices:
        raise ValueError(f"{flag(name)} must be one of {', '.join(choices)}; got {value!r:.80}")


def require_at_least(least: float, **values: float) -> None:
    """Raise ValueError, naming the option, for a value below `least` or NaN."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"{flag(name)} must be at least {least}, got {value}")


def require_free(out: Path, marks: Sequence[str], what: str = "a run", ways: str = "", overwrite: bool = False) -> None:
    """Raise ValueError unless results may be written into the folder `out`, which need not exist yet.

    Args:
        out: must be new, empty, or hold earlier results that `overwrite` gives up.
        marks: names of files; a folder with all of them holds earlier results.
        what: these results are.
        ways: options that would do, for the message, as "--resume, --overwrite".
        overwrite: whether earlier results may be replaced.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())  # where it is, or will be made
    if not place.is_dir():
        raise ValueError(f"{place} is a file, not a folder")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{place} cannot be written to: choose another --out")
    if place != out or not any(out.iterdir()):
        return
    if not all((out / mark).is_file() for mark in marks):
        raise ValueError(f"{out} holds something that is not {what}: choose another --out")
    if not overwrite:
        raise ValueError(f"{out} already holds {what}: {ways + ', or' if ways else 'choose'} another --out")


def require_new(out: Path | None) -> None:
    """Raise ValueError unless the file `out` can be made, and is not there yet; None is no file."""
    if out is not None:
        if out.exists():
            raise ValueError(f"{out} exists already; choose another --out")
        require_free(out, ())


def require_suffix(path: Path, suffix: str) -> None:
    """Raise ValueError unless a file that is to be written, and may be there, is named as its kind is."""
    if path.suffix.lower() != suffix:
        raise ValueError(f"--out {path}: the file to write must end in {suffix}")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new one and nothing between."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(partial, path)
