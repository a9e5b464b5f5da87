"""UserError: an error that the user can fix. It becomes one line; every other error keeps its traceback."""

import contextlib
from collections.abc import Iterator


class UserError(ValueError):
    """Options, files, data or folders that cannot be used. A command prints its first line and exits with status 2."""


def require(true: bool, otherwise: str) -> None:
    """Raise UserError(otherwise) unless `true` holds."""
    if not true:
        raise UserError(otherwise)


def first_line(error: BaseException) -> str:
    """Describe an error in one line, with the name of its file, if any. Control characters are escaped."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


@contextlib.contextmanager
def user_errors(what: object, *errors: type[Exception]) -> Iterator[None]:
    """Raise UserError, "WHAT: REASON", for errors of these types. Put it around reading what may be damaged."""
    try:
        yield
    except errors as error:
        raise UserError(f"{what}: {first_line(error):.150}") from None


@contextlib.contextmanager
def user_files() -> Iterator[None]:
    """Raise UserError for an OSError. Put it around reading files that the user named, never around long work."""
    try:
        yield
    except OSError as error:
        raise UserError(first_line(error)) from error
