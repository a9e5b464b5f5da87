"""Command-line options made from a dataclass and checked against its annotations, with one-line errors."""

import argparse
import contextlib
import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch

from tvm_ref.cli.errors import UserError, first_line, require
from tvm_ref.cli.stopping import INTERRUPTED, is_first_rank


class OneLineParser(argparse.ArgumentParser):
    """A parser whose help keeps the description's lines and states defaults, and whose errors take one line.

    Under torchrun only rank 0 prints.
    """

    def __init__(self, prog: str, description: str | None = None, **options: Any):
        defaults: dict[str, Any] = {"formatter_class": _Help, "allow_abbrev": False}
        super().__init__(prog, description=description, **defaults | options)

    def error(self, message: str) -> NoReturn:
        """Print `message` and a pointer to --help, and exit with status 2."""
        self._end(f"error: {message} (--help lists all options)", 2)

    @contextlib.contextmanager
    def errors(self, hint: str = "") -> Iterator[None]:
        """Exit with one line if the user can fix the error (status 2) or pressed Ctrl-C (status 130).

        So does a training that diverges (FloatingPointError, which its checks raise; status 1). Every other error
        keeps its traceback.

        Args:
            hint: how to go on afterwards; printed after "stopped" and after a traceback.
        """
        try:
            yield
        except UserError as error:
            self._end(f"error: {first_line(error)}", 2)
        except FloatingPointError as error:
            self._end(f"error: {first_line(error)}", 1)
        except KeyboardInterrupt:
            self._end("stopped" + (hint and f"; {hint}"), INTERRUPTED)
        except Exception as error:
            if hint:
                error.add_note(hint)
            raise

    def _end(self, line: str, status: int) -> NoReturn:
        if is_first_rank():
            sys.stdout.flush()
            print(f"{self.prog}: {line}", file=sys.stderr, flush=True)
        sys.exit(status)


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help and _with_default(action.help, action.default)


def _with_default(text: str, default: Any) -> str:
    """Add "(default: X)" to an option's help, unless the text states it or there is none; False is not shown."""
    if "default" in text or default in (None, False, {}, argparse.SUPPRESS):
        return text
    shown = " ".join(map(str, default)) if isinstance(default, list | tuple) else str(default)
    return f"{text} (default: {'yes' if default is True else shown.replace('%', '%%')})"


def run(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its status; a Ctrl-C that it does not catch ends it in one line, with status 130."""
    try:
        status = main()
    except KeyboardInterrupt:
        if is_first_rank():
            print("\nstopped", file=sys.stderr, flush=True)
        status = INTERRUPTED
    sys.exit(status)


def option(default: Any, help: str, **argparse_options: Any) -> Any:
    """Make a field of a configuration from its default, its help, and options that the annotation cannot express.

    `choices` are the keys of a registry; `resume` tells the program whether a run may be resumed with another value.
    A dict, filled from words NAME=VALUE, is copied for each object and left out of its hash.
    """
    metadata = {"help": help, **argparse_options}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, hash=False, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """Return the command-line option of a field."""
    return "--" + name.replace("_", "-")


def kinds(config: type) -> dict[str, tuple[type, bool, tuple[str, ...] | None]]:
    """Return the type of each field of a dataclass, whether it may be None, and its choices, if they are listed.

    For a field with several values (annotation tuple[float, ...] and nargs "+") the type is that of one value.
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
        kind = typing.get_origin(kind) or kind  # Mapping[str, Any] is a Mapping
        found[f.name] = (kind, types.NoneType in union, None if choices is None else tuple(choices))
    return found


def add_options(parser: argparse._ActionsContainer, config: type, only: Sequence[str] | None = None) -> None:
    """Add an option per field of a dataclass, or per field in `only`. Options not given stay absent when parsed."""
    for f in dataclasses.fields(config):
        if only is not None and f.name not in only:
            continue
        kind, _, choices = kinds(config)[f.name]
        default = {} if f.default is dataclasses.MISSING else f.default
        options = {k: v for k, v in f.metadata.items() if k not in ("help", "resume")}
        if kind is bool:
            options.setdefault("action", argparse.BooleanOptionalAction if default else "store_true")
        elif kind is Mapping:
            options = {"action": _NamedValues, "nargs": "+", "metavar": "NAME=VALUE"} | options
        elif choices is not None:
            options["choices"] = choices
        else:
            options = {"type": kind, "metavar": f.name.upper().split("_")[-1]} | options
        text = _with_default(f.metadata["help"].replace("%", "%%"), default)
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **options)


class _NamedValues(argparse.Action):
    """Collect words NAME=VALUE in a dict of strings."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = [word.partition("=") for word in values]
        if wrong := [name for name, equals, _ in pairs if not (name and equals)]:
            raise argparse.ArgumentError(self, f"must read NAME=VALUE ..., got {wrong[0]!r:.80}")
        setattr(namespace, self.dest, {name: value for name, _, value in pairs})


def read_settings(
    option: str, function: Callable[..., Any], values: Mapping[str, Any], without: Sequence[str] = ()
) -> dict[str, Any]:
    """Read values of a function's keyword-only arguments by their annotations: int, float, bool or str, or None.

    Args:
        option: the option that gave them, for messages.
        function: the function to call with them.
        values: by name: strings from a command line, or values from JSON.
        without: arguments that the user may not give.

    Raises:
        UserError: a name that the function does not have, a value that does not fit its annotation.
    """
    parameters = inspect.signature(function).parameters.values()
    known = {p.name: p.annotation for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in without}
    for name in values:
        if name not in known:
            raise UserError(f"{option} has no {name!r:.80}; it has {', '.join(known) or 'none'}")
    return {name: _read(f"{option} {name}", value, known[name]) for name, value in values.items()}


def _read(option: str, value: Any, annotation: Any) -> Any:
    """Read one value by its annotation: a type, or a type or None."""
    allowed = typing.get_args(annotation) or (annotation,)
    if types.NoneType in allowed and value in ("none", None):
        return None
    (kind,) = (a for a in allowed if a is not types.NoneType)
    if isinstance(value, str) and kind is bool:
        value = {"true": True, "false": False}.get(value, value)
    elif isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = kind(value)
    _check_type(option, value, kind, None)
    return value


def given(arguments: argparse.Namespace, config: type) -> dict[str, Any]:
    """Return the fields of a dataclass that the command line gave, by name; several values as a tuple."""
    found = {f.name: getattr(arguments, f.name) for f in dataclasses.fields(config) if hasattr(arguments, f.name)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def check_types(config: Any) -> None:
    """Raise UserError, naming the option, for a field that does not fit its annotation, as may come from a file."""
    many = {f.name for f in dataclasses.fields(config) if f.metadata.get("nargs")}
    for name, (kind, optional, choices) in kinds(type(config)).items():
        value = getattr(config, name)
        if value is None and optional:
            continue
        if name in many and not (isinstance(value, tuple) and value):
            raise UserError(f"{flag(name)} must be a list, and not empty; got {value!r:.80}")
        for item in value if name in many else (value,):
            _check_type(flag(name), item, kind, choices)


def _check_type(option: str, value: Any, kind: type, choices: tuple[str, ...] | None) -> None:
    """Raise UserError, naming the option, for a value of another type, or not among the choices."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Mapping: "names and values"}
    if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{option} must be {words.get(kind, kind.__name__)}, got {value!r:.80}")
    if choices is not None and value not in choices:
        raise UserError(f"{option} must be one of {', '.join(choices)}; got {value!r:.80}")


def require_at_least(least: float, **values: float) -> None:
    """Raise UserError, naming the option, for a value below `least` or NaN."""
    for name, value in values.items():
        require(value >= least, f"{flag(name)} must be at least {least}, got {value}")


def require_device(name: str) -> torch.device:
    """Return the device of a name ("cpu", "cuda:1", ...); raise UserError unless it can be used here."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} cannot be used here: {first_line(error)}") from None
    return device
