"""Where every member of a shard lies: the table that indexing makes of a shard, whatever its format, and reading uses.

A format is a `ShardFormat` in data/formats/shards.py. What it has to keep: ids are the rows of its table for ever, so a
scan finds the same rows in the same order each time; a reader refuses a shard that has changed since; and readers of
several forked processes share one open file, so they read by position (os.pread, mmap), never by seeking.
"""

import enum
import io
import math
import os
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from amclr_scale.errors import UserError


class ChangedShardError(UserError):
    """A shard is not what it was when the index was written."""


def check_regular(path: str | Path) -> None:
    """Refuse what is no regular file: a named pipe would be waited for for ever, and a device has no end.

    Raises:
        UserError: it is none.
        OSError: nothing is there.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path}: expected a regular file, got a folder, a named pipe or a device")


class Flag(enum.IntEnum):
    """What the scan already knows about a sample."""

    WHOLE = 0
    DUPLICATE_KEY = 1  # another sample of the shard has the same key
    CUT = 2  # the file ends inside it


@dataclass
class Members:
    """The member table of one shard: R samples, M members, in the order of the shard.

    `offset`, `size` and `header` say to the format's own reader where a member is, and what it was; these are a tar's.
    """

    row_start: NDArray[np.int64]  # (R + 1,), members row_start[r] .. row_start[r + 1] - 1 are sample r
    offset: NDArray[np.int64]  # (M,), first byte of the member's data
    size: NDArray[np.int64]  # (M,), bytes
    header: NDArray[np.uint32]  # (M,), crc32 of the header block in front of the data
    extension: NDArray[np.uint8]  # (M,), index into `extensions`
    flag: NDArray[np.uint8]  # (R,), Flag
    extensions: list[str]
    digest: str = ""  # sha256 that changes with any name, size, time or order of members; a tar's: of all headers
    damage: list[str] = field(default_factory=list)  # what was wrong with the shard, in words
    length: int = 0  # bytes of the shard
    source: str = ""  # which file was scanned: its address, size and time, hashed

    def __len__(self) -> int:
        return len(self.flag)

    def counts(self) -> dict[str, int]:
        """How many members there are of each extension."""
        totals = np.bincount(self.extension, minlength=len(self.extensions))
        return {name: int(n) for name, n in zip(self.extensions, totals, strict=True)}

    def of_row(self, row: int) -> dict[str, tuple[int, int, int]]:
        """Extension -> (offset, size, crc32 of the header) of one sample's members."""
        return {
            self.extensions[self.extension[m]]: (int(self.offset[m]), int(self.size[m]), int(self.header[m]))
            for m in range(self.row_start[row], self.row_start[row + 1])
        }

    def check(self) -> None:
        """Raise `ValueError` unless the columns fit together, whatever the format."""
        rows, members = len(self.flag), len(self.offset)
        for name in _COLUMNS:
            column, length = getattr(self, name), {"row_start": rows + 1, "flag": rows}.get(name, members)
            if column.shape != (length,) or column.dtype.kind not in "iu":
                raise ValueError(f"{name} of {column.dtype}, shape {column.shape}, for {rows} samples")
        if self.row_start[0] != 0 or self.row_start[-1] != members or (np.diff(self.row_start) < 1).any():
            raise ValueError(f"row_start does not divide {members} members among {rows} samples")
        if members and int(self.extension.max()) >= len(self.extensions):
            raise ValueError(f"an extension beyond the {len(self.extensions)} that are named")
        if min((int(column.min()) for column in (self.offset, self.size) if members), default=0) < 0 or self.length < 0:
            raise ValueError("a negative place or size")

    def save(self, path: Path) -> None:
        """Write a compressed .npz beside the index, whole or not at all."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        with partial.open("wb") as file:
            np.savez_compressed(
                file,
                **{name: getattr(self, name) for name in _COLUMNS},
                extensions=np.array(self.extensions, dtype=np.str_),
                damage=np.array(self.damage, dtype=np.str_),
                digest=np.array(self.digest),
                length=np.array(self.length),
                source=np.array(self.source),
            )
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Members":
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, or it is not a member table.
        """
        try:
            arrays = _read(path)
            found = cls(
                **{name: arrays[name] for name in _COLUMNS},
                extensions=[str(name) for name in arrays["extensions"]],
                digest=str(arrays["digest"]),
                length=int(arrays["length"]),
                source=str(arrays["source"]),
                damage=[str(words) for words in arrays["damage"]],
            )
            found.check()
            return found
        except _UNREADABLE as error:
            raise UserError(
                f"{path}: expected a member table of amclr-scale shards index, got {error}; index the shards again"
            ) from error


_COLUMNS = ("row_start", "offset", "size", "header", "extension", "flag")
_PACKED_AT_MOST = 100  # bytes for one in the file; honest tables have about 4
_SMALL = 1 << 20  # bytes: of smaller tables nothing is asked
_UNREADABLE = (
    OSError, EOFError, KeyError, ValueError, TypeError, IndexError, RuntimeError, NotImplementedError, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip


def _read(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz, none of them larger than the file says or than its size makes likely.

    numpy's own reader takes memory for the shape that an array claims before it looks for its bytes.
    """
    check_regular(path)
    with zipfile.ZipFile(path) as file:
        entries = file.infolist()
        total = sum(entry.file_size for entry in entries)
        if total > max(_SMALL, _PACKED_AT_MOST * path.stat().st_size):
            raise ValueError(f"{path.stat().st_size:,} bytes that say they hold {total:,}")
        return {entry.filename.removesuffix(".npy"): _array(file.read(entry)) for entry in entries}


def _array(content: bytes) -> NDArray[Any]:
    stream = io.BytesIO(content)
    form: Any = np.lib.format  # without types, before numpy 2.3
    read_header = {(1, 0): form.read_array_header_1_0, (2, 0): form.read_array_header_2_0}
    shape, _, dtype = read_header[form.read_magic(stream)](stream)
    if dtype.kind not in "iuU" or len(shape) > 1:
        raise ValueError(f"an array of {dtype}, shape {shape}")
    count = math.prod(shape)
    if count * dtype.itemsize != len(content) - stream.tell():
        raise ValueError(f"{len(content) - stream.tell():,} bytes for {count:,} numbers of {dtype}")
    found = np.frombuffer(content, dtype, offset=stream.tell()) if count and dtype.itemsize else np.empty(count, dtype)
    return found.reshape(shape)


class ShardReader(Protocol):
    """One open shard: samples by row."""

    url: str
    members: Members

    def read(self, row: int, wanted: frozenset[str]) -> dict[str, bytes]:
        """Extension -> bytes of those members of a sample that are there and wanted.

        Raises:
            ChangedShardError: they are not what was indexed.
            UserError: the file cannot be read any more.
        """

    def key(self, row: int) -> str:
        """The sample's name in its shard, for messages."""

    def close(self) -> None:
        """Close the file."""


@dataclass(frozen=True)
class ShardFormat:
    """How the shards of one kind are indexed and read.

    Attributes:
        scan: the member table of a local file; what is damaged is recorded, a file of another kind is a `UserError`.
        reader: from a shard's address, a descriptor of the local file (the reader closes it) and the table.
    """

    scan: Callable[[Path], Members]
    reader: Callable[[str, int, Members], ShardReader]
