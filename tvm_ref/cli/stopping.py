"""Signals: Ctrl-C and SIGTERM finish the step under way, SIGUSR1 asks for a checkpoint."""

import os
import signal
from typing import Any

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
