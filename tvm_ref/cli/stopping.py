"""Signals: Ctrl-C and SIGTERM finish the step under way, SIGUSR1 asks for a checkpoint."""

import os
import signal
from typing import Any, Self

INTERRUPTED = 130  # exit status
SAVE_SIGNALS = tuple(s for s in signal.Signals if s.name == "SIGUSR1")  # none on Windows


def is_first_rank() -> bool:
    """Return whether this process is the one that prints: rank 0 under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class _Noted:
    """Context that records signals instead of raising them."""

    signals: tuple[signal.Signals, ...] = ()

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> Self:
        self._before = {s: signal.signal(s, self._note) for s in self.signals}
        return self

    def _note(self, *_: Any) -> None:
        self.requested = True

    def __exit__(self, *_: Any) -> None:
        for s, handler in self._before.items():
            signal.signal(s, handler)


class Interruption(_Noted):
    """Record Ctrl-C or SIGTERM instead of raising, so that the current step finishes. A second signal is raised."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def _note(self, *_: Any) -> None:
        self.requested = True
        self.__exit__()


class SaveRequests(_Noted):
    """Record SIGUSR1, which schedulers send some time before they end a job, to save and go on."""

    signals = SAVE_SIGNALS

    def take(self) -> bool:
        """Return whether a signal came since the last call."""
        noted, self.requested = self.requested, False
        return noted
