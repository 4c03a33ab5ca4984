"""One job at a time in a run folder: a second one would overwrite the first one's checkpoints and records.

    RUN/.lock           empty; every rank of the job holds one byte of it, as a POSIX record lock
    RUN/.holder.json    who holds it: host, process, since when; rank 0 touches it every few seconds

A record lock belongs to its process alone: kill -9 frees it, and no forked child keeps it. File systems differ: some
have no locks, and some keep them on one machine without saying so (NFS mounted with `nolock` or `local_lock`, Lustre
with `localflock`). So the holder's file is looked at too. One that was left by this machine is stale once its process
is gone; one that was left by another machine, once it has not been touched for `STALE` seconds, by the file system's
own clock. Imports no torch.
"""

import contextlib
import errno
import fcntl
import json
import os
import platform
import secrets
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from amclr_scale.errors import UserError

LOCK, HOLDER = ".lock", ".holder.json"
BEAT = 5.0  # seconds between two touches
STALE = 30.0  # seconds without one
LATE = 10.0  # seconds that a file of rank 0 may take to be seen by the others
ENDING = 5.0  # seconds that the processes of a job that ends are waited for; `supervise --elastic` sets more
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def _machine() -> str:
    """This host since it was started: containers and clusters repeat host names."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = ""
    return f"{platform.node()} {boot}".strip()


class RunLock:
    """Held from the call of `take` or `join` on, until it is left (`with`) or the process ends, however it does."""

    def __init__(self, folder: Path, file: int | None, rank: int):
        self.folder, self._rank = folder, rank
        self._file = file  # None: this rank does not see the folder that rank 0 has locked
        self.token = ""  # of the job, in the holder's file: whoever sees it looks into the same folder
        self._left = threading.Event()

    @classmethod
    def take(cls, folder: Path) -> "RunLock":
        """Lock a run folder (made if need be) for a whole job. Rank 0 calls it.

        Raises:
            UserError: another job is in it, or it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"run.folder: {folder} cannot be written: {error}") from error
        lock = cls(folder, file, 0)
        try:
            works = lock._lock_all()
            lock._refuse_another(works)
            lock._announce()
        except BaseException:
            os.close(file)
            raise
        return lock

    @classmethod
    def join(cls, folder: Path, rank: int, token: str, shared: bool = True) -> "RunLock":
        """Hold another rank's byte, after rank 0 has taken the lock: no job begins beside what is left of this one.

        Args:
            shared: whether this has to be the folder that rank 0 sees; where it has not, and is not, none is held.

        Raises:
            UserError: this is not the folder that rank 0 sees, or it cannot be written here.
        """
        lock = cls(folder, None, rank)
        lock.token = token
        if not shared and _unseen(folder, token):
            return lock
        _wait_for(folder, token)
        lock._hold()
        return lock

    def _hold(self) -> None:
        """Lock this rank's byte.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            self._file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{self.folder.absolute()} cannot be written: {error.strerror}") from error
        with contextlib.suppress(OSError):  # rank 0 has found out whether there are locks here
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._rank)

    def look_again(self) -> None:
        """Hold a folder that is rank 0's after all: a network file system may have shown it late.

        Raises:
            UserError: it cannot be written.
        """
        if self.away and not _unseen(self.folder, self.token):
            self._hold()

    @property
    def away(self) -> bool:
        """Whether this rank does not see the folder that rank 0 has locked."""
        return self._file is None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Let the next job in."""
        self._left.set()
        if self._rank == 0:
            (self.folder / HOLDER).unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)

    def _lock_all(self) -> bool:
        """Hold every rank's byte for a moment, then rank 0's. Returns whether the file system has locks."""
        assert self._file is not None
        until = time.monotonic() + float(os.environ.get("AMCLR_SCALE_LOCK_SECONDS", ENDING))
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno in _NO_LOCKS:
                    return False
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise UserError(f"run.folder: {self.folder / LOCK} cannot be locked: {error}") from error
                if time.monotonic() > until:
                    raise self._refusal(self._holder()) from error
            time.sleep(0.1)
        fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)  # all but byte 0
        return True

    def _refuse_another(self, works: bool) -> None:
        """Raise `UserError` where the holder's file is that of a job which lives, though no lock says so."""
        holder = self._holder()
        if not holder:
            return
        if holder["machine"] == _machine():
            if not works and _alive(holder):
                raise self._refusal(holder)
            return
        touched = self._touched()
        while self._now() - touched < STALE:
            time.sleep(BEAT / 5)
            if self._touched() > touched:
                raise self._refusal(holder)

    def _announce(self) -> None:
        """Say who we are, and go on saying that we live."""
        process = psutil.Process()
        self.token = secrets.token_hex(8)
        words = {
            "token": self.token,
            "host": platform.node(),
            "machine": _machine(),
            "pid": process.pid,
            "started": process.create_time(),
            "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        }
        path = self.folder / HOLDER
        try:
            path.write_text(json.dumps(words, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"run.folder: {path} cannot be written: {error}") from error

        def touch() -> None:
            while not self._left.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(path)

        threading.Thread(target=touch, name="run lock", daemon=True).start()

    def _holder(self) -> dict[str, Any]:
        try:
            found = json.loads((self.folder / HOLDER).read_text())
        except (OSError, ValueError):  # none, or half of it: whoever wrote it was killed at once
            return {}
        return found if isinstance(found, dict) and {"machine", "pid", "started"} <= found.keys() else {}

    def _touched(self) -> float:
        try:
            with (self.folder / HOLDER).open() as file:  # opening has a network file system look again
                return os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return 0.0

    def _now(self) -> float:
        """The time by the clock that the holder's touches are stamped with."""
        assert self._file is not None
        os.utime(self._file)
        return os.fstat(self._file).st_mtime

    def _refusal(self, holder: dict[str, Any]) -> UserError:
        who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}" if holder else "unknown"
        return UserError(
            f"run.name: {self.folder} is being written by another job ({who}); wait until it has ended, end it, or "
            "choose another name"
        )


def _unseen(folder: Path, token: str) -> str:
    """Why the holder's file in this folder is not rank 0's, in words; "" where it is."""
    try:
        os.listdir(folder.parent)  # a network file system looks again
        found = json.loads((folder / HOLDER).read_text())
        if isinstance(found, dict) and found.get("token") == token:
            return ""
        return "holds another job's .holder.json"
    except (OSError, ValueError) as error:
        return f"does not have what rank 0 wrote there ({getattr(error, 'strerror', None) or error})"


def _wait_for(folder: Path, token: str) -> None:
    """Raise `UserError` unless the holder's file in this folder is rank 0's.

    A network file system may show a file some seconds late, even a folder that it was asked for before it was made.
    """
    until = time.monotonic() + LATE
    while words := _unseen(folder, token):
        if time.monotonic() > until:
            raise UserError(f"{folder.absolute()} {words}")
        time.sleep(0.2)


def _alive(holder: dict[str, Any]) -> bool:
    """Whether the very process lives: numbers are used again."""
    if holder["pid"] == os.getpid():
        return False
    try:
        return bool(abs(psutil.Process(int(holder["pid"])).create_time() - float(holder["started"])) < 1)
    except psutil.Error:
        return False
