"""The index of a data set: which shards, how many samples each, and where every member lies.

On disk it is JSON (`data/indexes/entries.py`) or, for very many shards, one binary file (`data/indexes/binary.py`).

A sample's id is its shard's first id plus its row, so ids are dense, 0 .. N-1, need no metadata, and follow one another
where several data sets are listed. A sample that cannot be read keeps its id.
"""

import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.formats.members import ChangedShardError, Members, ShardReader
from amclr_scale.data.formats.shards import format_of, is_packed
from amclr_scale.data.indexes.entries import Shard
from amclr_scale.data.indexes.shard_lists import Joined, Shards
from amclr_scale.data.sources import is_remote
from amclr_scale.data.storage import Storage
from amclr_scale.distributed import preparing
from amclr_scale.errors import AbsentDataError, UserError

_FEW, _PER_BYTE = 10_000, 10  # samples of a small table; and for each byte of a larger one, where honest ones have 0.2
_OPEN_SHARDS = 128  # of which a process keeps the member table and the file,
_MOST_OPEN = 1024  # and at most; a table of 10,000 samples takes 0.8 MB


class Index:
    """The shards of one data set (or of several, one after another), and the ids of their samples."""

    def __init__(self, shards: Shards | Sequence[Shard], storage: Storage, further: Sequence[Shards] = ()):
        own = shards if isinstance(shards, Shards) else Shards(shards)
        self.shards = Joined([own, *further]) if further else own
        self.storage = storage
        self.open_shards = _OPEN_SHARDS
        self.parts = [len(own), *map(len, further)]  # how many shards each data set has
        self.first_id: NDArray[np.int64] = np.concatenate([[0], np.cumsum(self.shards.counts)])  # (shards + 1,)
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def num_samples(self) -> int:
        """N."""
        return int(self.first_id[-1])

    @property
    def fingerprint(self) -> str:
        """Of the content: the same wherever the shards lie, different when any sample moved. 32 hex digits."""
        return self.fingerprint_of(slice(None))

    def fingerprint_of(self, shards: slice) -> str:
        """Of some shards' content, as an index of these alone would have it."""
        start, stop, _ = shards.indices(len(self.shards))
        return self.shards.fingerprint_of(start, stop)

    def locate(self, sample: int) -> tuple[int, int]:
        """The (shard, row) of an id."""
        shard = int(np.searchsorted(self.first_id, sample, "right")) - 1
        return shard, sample - int(self.first_id[shard])

    def part_of(self, sample: int) -> tuple[int, int]:
        """The first id of the data set that an id belongs to, and the first behind it."""
        bounds = self.first_id[np.cumsum([0, *self.parts])]
        part = int(np.searchsorted(bounds, sample, "right")) - 1
        return int(bounds[part]), int(bounds[part + 1])

    def reader(self, shard: int) -> ShardReader:
        """That shard, open; the least recently used of many is closed."""
        reader = self._readers.get(shard)
        if reader is None:
            entry = self.shards[shard]
            check_table(entry)
            members = Members.load(entry.members)
            if len(members) != entry.num_samples:
                raise ChangedShardError(
                    f"{entry.url}: expected {entry.num_samples:,} samples (from the index), got a member table with "
                    f"{len(members):,}; index the shards again"
                )
            if members.digest != entry.digest:
                raise ChangedShardError(f"{entry.url}: {entry.members} is the table of another shard; index it again")
            file = self.storage.open(entry.url, entry.sha256)
            _check_size(entry, file)
            reader = format_of(entry.url).reader(entry.url, file, members)
            self._readers[shard] = reader
            if len(self._readers) > self.open_shards:
                self._readers.popitem(last=False)[1].close()
        else:
            self._readers.move_to_end(shard)
        return reader

    def keep_open(self, shards: int) -> None:
        """Keep so many shards open, if this process may have the files: else samples that come by turns from more
        shards would each open one.
        """
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4  # others, and captions beside shards, have some too
        most = min(_MOST_OPEN, files) if files > 0 else _MOST_OPEN
        self.open_shards = max(self.open_shards, min(shards, most))

    def close(self) -> None:
        """Close every file."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}  # another process opens its own files


def check_files(shards: Iterable[Shard], key: str) -> None:
    """Every local shard is there, and as long as it was when it was indexed.

    Raises:
        UserError: one is missing.
        ChangedShardError: one has another size.
    """
    for shard in shards:
        if is_remote(shard.url):
            continue
        try:
            status = os.stat(shard.url)
            size = status.st_size
        except OSError as error:
            raise AbsentDataError(f"{key}: no such shard: {shard.url} ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{key}: {shard.url}: expected a regular file, got a folder, a named pipe or a device")
        if shard.file_size is not None and size != shard.file_size:
            raise ChangedShardError(f"{key}: {_changed(shard, size)}")
        preparing.advance("shards looked at")


def _check_size(shard: Shard, file: int) -> None:
    """Of a shard that is opened: not every process looks at all of them at its start. Closes the file if it is wrong.

    Raises:
        ChangedShardError: it has another size.
    """
    if shard.file_size is None or is_remote(shard.url) or is_packed(shard.url):
        return
    if (size := os.fstat(file).st_size) != shard.file_size:
        os.close(file)
        raise ChangedShardError(_changed(shard, size))


def _changed(shard: Shard, size: int) -> str:
    return (
        f"{shard.url}: expected {shard.file_size:,} bytes (from the index), got {size:,}: the shard has changed; "
        "restore it, or index the shards again and start a new run"
    )


def check_table(shard: Shard) -> None:
    """Refuse a count of samples that a member table of its size can hardly hold, before memory is taken for them.

    Raises:
        UserError: naming the table.
    """
    try:
        packed = shard.members.stat().st_size
    except OSError as error:
        raise UserError(
            f"{shard.url}: its member table {shard.members} is not there ({error.strerror}); index the shards again"
        ) from error
    if shard.num_samples > max(_FEW, _PER_BYTE * packed):
        raise UserError(
            f"{shard.url}: {shard.num_samples:,} samples cannot be in a member table of {packed:,} bytes "
            f"({shard.members}); index the shards again"
        )
