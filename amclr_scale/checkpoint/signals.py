"""SIGTERM, SIGUSR1 and time limits end a run between two steps; a second signal ends it at once.

Imports no torch.
"""

import os
import signal
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the state is saved, start the same command again
ENDING = (signal.SIGTERM, signal.SIGUSR1)


class StoppedError(Exception):
    """The run was asked to end early. Its state is saved; `str()` says why and where."""


class Signals:
    """While it is entered, the first signal is remembered and the second one ends the process.

    Attributes:
        received: the signal's name, or "".
    """

    def __init__(self) -> None:
        self.received = ""
        self._began = time.monotonic()
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked data worker: its parent decides
            return
        if self.received:
            os._exit(128 + number)
        self.received = signal.Signals(number).name

    def hours(self) -> float:
        """Since this object was made, which may be before it is entered."""
        return (time.monotonic() - self._began) / 3600

    def __enter__(self) -> "Signals":
        for number in ENDING:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
