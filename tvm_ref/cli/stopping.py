"""Ctrl-C: noted while a step is finished, and at any other time the end of a command in one line."""

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130  # exit status


SAVE_SIGNALS = tuple(s for s in signal.Signals if s.name == "SIGUSR1")  # none on Windows


def is_first_rank() -> bool:
    """Tell whether this process is the one that prints: the first under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


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


class SaveRequests:
    """SIGUSR1, noted: a scheduler sends it some time before it ends a job, to save and go on."""

    def __init__(self) -> None:
        self._noted = False

    def __enter__(self) -> "SaveRequests":
        self._before = {s: signal.signal(s, self._note) for s in SAVE_SIGNALS}
        return self

    def _note(self, *_: Any) -> None:
        self._noted = True

    def take(self) -> bool:
        """Tell whether a signal came since this was last asked."""
        noted, self._noted = self._noted, False
        return noted

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


def leave_at_once() -> None:
    """Let Ctrl-C end the program without an exception: imports would answer a KeyboardInterrupt with a traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_again() -> None:
    """Undo leave_at_once."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _leave(*_: Any) -> NoReturn:
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        if is_first_rank():
            os.write(sys.stderr.fileno(), b"\nstopped\n")
    os._exit(INTERRUPTED)


def _is_command() -> bool:
    """Tell whether this program is a command of the project, and not one that uses it as a library."""
    if sys.argv[:1] == ["-m"]:
        return any(a.startswith("tvm_ref.") for a in sys.orig_argv)
    root, main = Path(__file__).resolve().parents[2], getattr(sys.modules["__main__"], "__file__", None)
    return main is not None and Path(main).resolve().parent in (root / "imagenet", root / "tutorials")


if _is_command():
    leave_at_once()  # from here on: the package, and with it PyTorch, is imported before the command begins
