"""SIGTERM, SIGUSR1, Ctrl-C and time limits end a run between two steps; a second request ends it at once.

Python runs a signal's handler only when the main thread is between two of its own instructions, and a rank may spend
minutes inside one: waiting for others, or in a kernel. So the system's notice (`signal.set_wakeup_fd`) goes to a
thread, which can always say what will happen, and end the process. Imports no torch.
"""

import atexit
import os
import select
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, NoReturn

EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the state is saved, start the same command again
ENDING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME = 2.0  # seconds: a terminal signals all processes at once, and launchers then hand on what they were sent as well
_STOP = b"\0"  # no signal's number: the thread ends
_SHOW_CURSOR = "\x1b[?25h"  # which a progress line hides


class UnsavedError(Exception):
    """A checkpoint that the run cannot do without could not be written. All ranks raise it at the same place."""


class StoppedError(Exception):
    """The run was asked to end early. Its state is saved; `str()` says why and where."""


class Signals:
    """While it is entered, a request to end is remembered, for the run to save at a step that all ranks agree on.

    Where nothing would be lost (`saves` is False: before the first step, and after the last one is saved) the process
    ends at once, with the exit code of a run that can go on. A second request ends it at once, whatever it does: with
    that exit code too, if the state is saved by then.

    Args:
        speaks: whether to say so, on stderr; one rank does.

    Attributes:
        saves: whether the run saves when it is asked to end.
        received: why, in words, or "".
        failed: the run ends by its own error. Launchers then end all ranks, and words about saving would be wrong.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.speaks, self.saves, self.failed, self.received = speaks, False, False, ""
        self._began, self._asked_at = time.monotonic(), 0.0
        self._owner = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._lock = threading.RLock()  # a handler may interrupt a handler

    def hours(self) -> float:
        """Since this object was made, which may be before it is entered."""
        return (time.monotonic() - self._began) / 3600

    def ask(self, why: str, number: int = 0) -> None:
        """A request to end, from whatever thread.

        Args:
            why: which signal came, or what else has happened.
            number: of the signal; 0: none, and what else has happened is never a second request.
        """
        with self._lock:
            again = bool(self.received)
            if again and (not number or time.monotonic() - self._asked_at < SAME):
                return
            self.received = self.received or why
            self._asked_at = time.monotonic()
            if again:
                self._say(f"{why}, again: the run ends at once")
                os._exit(128 + number if self.saves or self.failed else EXIT_RESUMABLE)
            if self.failed:
                return
            if not self.saves:
                self._say(f"{why}: the run ends; nothing was trained since the last save, so nothing is lost")
                os._exit(EXIT_RESUMABLE)
            self._say(f"{why}: the run saves after the present step and ends; once more, and it ends at once, unsaved")

    def note_failure(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """For `ExitStack.push`: what leaves a block, unless somebody asked for it, is an error of the run."""
        self.failed = self.failed or not (kind is None or issubclass(kind, StoppedError))

    def leave(self, code: int) -> NoReturn:
        """End the process with this code, whatever signals come meanwhile; inside of `with`.

        Python gives signals their own effect back before the libraries' farewell, which takes a while, is over: one
        that came then ended a saved run as if it were not. So what is registered with `atexit` is done, and no more.
        """
        self.saves = False
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):  # nobody reads it any more
                stream.flush()
        os._exit(code)

    def _say(self, words: str) -> None:
        if self.speaks:  # not through sys.stderr, which the main thread may hold
            os.write(2, f"\n{_SHOW_CURSOR if os.isatty(2) else ''}{words}\n".encode())

    def _take(self) -> bool:
        """Act on what the kernel has noted. Returns whether more may come."""
        with self._lock:
            try:
                noted = os.read(self._ours, 64)
            except BlockingIOError:  # the other thread took it
                return True
            for number in noted:
                if number in ENDING:
                    self.ask(f"{signal.Signals(number).name} came", number)
            return _STOP not in noted

    def _listen(self) -> None:
        while True:
            select.select([self._ours], [], [])
            if not self._take():
                return

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() == self._owner:  # not a forked data worker: its parent decides
            self._take()

    def __enter__(self) -> "Signals":
        self._ours, self._kernels = os.pipe()
        for end in (self._ours, self._kernels):
            os.set_blocking(end, False)
        self._wakeup_before = signal.set_wakeup_fd(self._kernels, warn_on_full_buffer=False)
        for number in ENDING:
            self._before[number] = signal.signal(number, self._handle)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._kernels, _STOP)
        self._thread.join()
        os.close(self._kernels)
        os.close(self._ours)


os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # else a signal to a child is noted as ours
