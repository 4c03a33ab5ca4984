"""Checkpoints and records of runs in a store, kept in the cache of this machine for those who read them there.

Of each run the newest checkpoint is kept that was asked for, and those that some process still reads: it holds a lock
on a file beside it, `.step_00000200.reading`, which goes with the process. Imports no torch.
"""

import fcntl
import logging
import os
from pathlib import Path

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import fetch, fetch_records, not_used, nothing, same
from amclr_scale.checkpoint.files import CHECKPOINTS
from amclr_scale.checkpoint.remote import RemoteError, RemoteRun, address_key, name_in
from amclr_scale.data.storage import cache_folder, locked
from amclr_scale.disk import is_full, unwritten
from amclr_scale.errors import UserError

log = logging.getLogger(__name__)
CACHE = "XDG_CACHE_HOME"


class LocalCopy:
    """A checkpoint in the cache that no other process removes while this object lives.

    Attributes:
        path: the checkpoint.
    """

    def __init__(self, path: Path):
        self.path, self._file = path, -1
        self._file = os.open(_mark(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def alone(self, wait: bool = False) -> bool:
        """Whether nobody else reads it; nobody does from then on, until `shared`."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def shared(self) -> None:
        """Others may read it too."""
        fcntl.flock(self._file, fcntl.LOCK_SH)

    def close(self) -> None:
        """It may be removed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def _mark(checkpoint: Path) -> Path:
    return checkpoint.with_name(f".{checkpoint.name}.reading")


def kept_records(remote: RemoteRun) -> Path:
    """A folder in the cache with what is in a run's folder beside its checkpoints.

    Raises:
        UserError: the disk is full.
        RemoteError: the store does not answer.
    """
    folder = _home(remote) / name_in(remote.url)
    with locked(folder, CACHE):
        try:
            fetch_records(remote, folder)
        except OSError as error:
            raise unwritten(error, CACHE, folder) from error
    return folder


def _home(remote: RemoteRun) -> Path:
    home = cache_folder(None, CACHE) / "runs" / address_key(remote.url)
    try:
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritten(error, CACHE, home) from error
    return home


def local_copy(url: str, key: str) -> LocalCopy:
    """The newest checkpoint of a run in a store, or the one that the address names, in the cache; fetched if need be.

    Older ones there that nobody reads are removed.

    Raises:
        UserError: there is none, the store does not answer, or the disk is full.
    """
    remote = RemoteRun(url, key)
    home, complaints = _home(remote), list[str]()
    folder = home / name_in(remote.url)
    with locked(folder, CACHE):
        try:
            for step in remote.candidates(complaints):
                try:
                    found = _with_room(remote, step, folder / CHECKPOINTS)
                except ValueError as error:
                    complaints.append(not_used(remote, step, error))
                    continue
                fetch_records(remote, folder)
                _remove_others(folder / CHECKPOINTS, step)
                return found
        except RemoteError as error:
            raise UserError(f"{key}: {error}") from error
        except OSError as error:
            raise unwritten(error, CACHE, home) from error
    raise nothing(remote, complaints)


def _brought(remote: RemoteRun, step: int, folder: Path) -> LocalCopy:
    """Fetch a checkpoint, unless it is there; what others read is not replaced while they do."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = LocalCopy(folder / files.name_of(step))
    try:
        if not copy.alone() and not same(remote, step, folder):
            log.warning("%s: another process reads an earlier %s; waiting until it is done", copy.path, copy.path.name)
            copy.alone(wait=True)
        fetch(remote, step, folder)
        copy.shared()
    except BaseException:
        copy.close()
        if not copy.path.exists():
            _mark(copy.path).unlink(missing_ok=True)
        raise
    return copy


def _with_room(remote: RemoteRun, step: int, folder: Path) -> LocalCopy:
    """The same; where the disk is full, others that nobody reads go first."""
    try:
        return _brought(remote, step, folder)
    except OSError as error:
        if not is_full(error) or not _remove_others(folder, step):
            raise
    return _brought(remote, step, folder)


def _remove_others(folder: Path, step: int) -> bool:
    """Remove the checkpoints of other steps that nobody reads; whether there was one."""
    removed = [_remove(folder / files.name_of(other)) for other in files.steps(folder) if other != step]
    return any(removed)


def _remove(checkpoint: Path) -> bool:
    copy = LocalCopy(checkpoint)
    try:
        if alone := copy.alone():
            files.remove(checkpoint)
            _mark(checkpoint).unlink(missing_ok=True)
        return alone
    finally:
        copy.close()
