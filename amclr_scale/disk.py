"""Whether a disk has room: asked before something large is written, and told in words where it has not."""

import errno
import shutil
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from amclr_scale.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FullDiskError(UserError):
    """What could not be written because a disk is full, in words."""


class FullError(OSError):
    """A disk cannot take what is about to be written: `str()` says how much, and where."""

    def __init__(self, words: str):
        super().__init__(errno.ENOSPC, words)

    def __str__(self) -> str:
        return str(self.strerror)


def save_tensors(tensors: dict[str, Any], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that others may read as they may read the files beside it.

    The library gives its files to their owner alone, whatever the umask says: a group that shares a folder of runs
    could then read everything of a run but its weights.

    Raises:
        OSError, SafetensorError: the disk does not take it.
    """
    from safetensors.torch import save_file

    save_file(tensors, file, metadata=metadata)
    give_usual_mode(file)


def give_usual_mode(file: Path) -> None:
    """Let a file be read by those who may read a new file beside it.

    Raises:
        OSError: the disk takes no file beside it.
    """
    beside = file.with_name(f".{file.name}.mode")  # a new file has the mode that the umask leaves, in any thread
    try:
        beside.touch()
        with suppress(PermissionError):  # a file system without modes has its own rule
            file.chmod(stat.S_IMODE(beside.stat().st_mode))
    finally:
        beside.unlink(missing_ok=True)


def _size(size: int) -> str:
    if size < 2**20:
        return f"{size:,} bytes"
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def free_at(folder: Path) -> int:
    """Bytes that can be written into a folder that is there or will be made.

    A file system that has no size at all, as those of FUSE that tell none, counts as without end: what it cannot take
    shows when it is written.

    Raises:
        OSError: nothing is known of its file system.
    """
    there = next((path for path in (folder, *folder.parents) if path.exists()), Path("."))
    usage = shutil.disk_usage(there)
    return usage.free if usage.total else sys.maxsize


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise `FullError` where a folder's disk has less room than `needed` bytes.

    Args:
        what: takes them, for the message.
    """
    free = free_at(folder.absolute())
    if needed > free:
        raise FullError(f"expected {_size(needed)} free in {folder} for {what}, got {_size(free)}")


def is_full(error: BaseException | None) -> bool:
    """Whether something failed because a disk, or a user's share of one, is full."""
    return isinstance(error, OSError) and error.errno in _FULL


def unwritten(error: OSError, key: str, folder: Path, fix: str = "") -> UserError:
    """The words for what could not be written.

    Args:
        key: that says where `folder` is.
        fix: what else can be changed.
    """
    mend = f"; make room there, or set {key} to a larger disk{fix}"
    if isinstance(error, FullError):
        return FullDiskError(f"{key}: {error}{mend}")
    if is_full(error):
        return FullDiskError(
            f"{key}: the disk of {folder} is full ({error.strerror}); nothing half-written is kept{mend}"
        )
    return UserError(f"{key}: {folder} cannot be written: {error}")
