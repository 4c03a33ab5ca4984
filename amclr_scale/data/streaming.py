"""Remote shards through memory: read front to back, held while their window is served, never on a disk.

Samples of a shuffle window are served in an order of their own, so all of a window's shards have to be at hand at once;
that is what exact order costs where a store can only be read front to back. A rank holds the present and the next
window of each of its lanes:

    2 x data.shuffle_window x (data.lanes / ranks) shards

They lie as files in the machine's shared memory (/dev/shm), where a rank's worker processes find them too, in a folder
that goes with its process. One that a killed process has left is removed by the next one that starts.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import IO

from amclr_scale.disk import free_at
from amclr_scale.errors import UserError

MEMORY = Path("/dev/shm")
_PREFIX = "amclr_scale_stream_"
_HELD = "held"  # in the folder: locked by the process that owns it


class Stream:
    """A folder in shared memory, made when it is first needed."""

    def __init__(self, memory: Path | None = None):
        self._memory = memory or MEMORY
        self._folder: Path | None = None
        self._held: IO[bytes] | None = None
        self._owner = 0
        self._closed = False

    def folder(self) -> Path:
        """Where shards go.

        Raises:
            UserError: this machine has no such memory.
        """
        if self._closed:  # a fetch that was under way must not begin anew
            raise UserError("data.stream: expected a loader that is open, got one that was closed")
        if self._folder is None:
            self._sweep()
            self._folder = self._make()
        return self._folder

    def _make(self) -> Path:
        while True:
            try:
                folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self._memory))
            except OSError as error:
                raise UserError(
                    f"data.stream: expected shared memory in {self._memory} (Linux), got: {error.strerror or error}; "
                    "use data.cache on a local disk"
                ) from error
            with contextlib.suppress(FileNotFoundError):  # another rank swept it away before it was locked
                self._held, self._owner = (folder / _HELD).open("wb"), os.getpid()
                fcntl.flock(self._held, fcntl.LOCK_EX)
                os.stat(folder / _HELD)
                return folder

    def check_room(self, needed: int) -> None:
        """Raise `UserError` where the shared memory cannot hold so many bytes more."""
        free = free_at(self.folder())
        if needed > free:
            raise UserError(
                f"data.stream: expected {needed / 2**30:.3g} GiB of shared memory for the shards that the lanes of "
                f"this machine's ranks read at once, got {free / 2**30:.3g} in {self._memory}; lower "
                "data.shuffle_window, make the shards smaller, or give the container more (--shm-size)"
            )

    def close(self) -> None:
        """Give the memory back. In a forked process it does nothing."""
        self._closed = True
        if self._folder is not None and self._owner == os.getpid():
            closed = self._folder.with_name(f"{self._folder.name}_closed")
            with contextlib.suppress(OSError):
                self._folder.rename(closed)  # a fetch that is under way finds no place to write to
            shutil.rmtree(closed, ignore_errors=True)
            self._folder = None

    def __del__(self) -> None:
        self.close()

    def _sweep(self) -> None:
        """Remove folders whose owners were killed: nobody holds their lock any more."""
        for folder in self._memory.glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), (folder / _HELD).open("rb") as held:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_held": None, "_owner": 0}
