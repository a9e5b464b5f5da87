"""Signals: Ctrl-C and SIGTERM finish the step under way, SIGUSR1 asks for a checkpoint."""

import os
import signal
from typing import Any, Self

INTERRUPTED = 130  # exit status
SAVE_SIGNALS = tuple(s for s in signal.Signals if s.name == "SIGUSR1")  # none on Windows


def is_first_rank() -> bool:
    """Tell whether this process is the one that prints: the first under torchrun, or the only one."""
    return os.environ.get("RANK", "0") == "0"


class _Noted:
    """Signals, noted instead of raised while this is entered."""

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
    """Ctrl-C or SIGTERM, noted instead of raised, so that the step under way is finished. A second one is raised."""

    signals = (signal.SIGINT, signal.SIGTERM)

    def _note(self, *_: Any) -> None:
        self.requested = True
        self.__exit__()


class SaveRequests(_Noted):
    """SIGUSR1, noted: a scheduler sends it some time before it ends a job, to save and go on."""

    signals = SAVE_SIGNALS

    def take(self) -> bool:
        """Tell whether a signal came since this was last asked."""
        noted, self.requested = self.requested, False
        return noted
