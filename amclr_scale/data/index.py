"""The index of a data set: which shards, how many samples each, and where every member lies.

On disk it is the `shardlist` JSON of the webdataset family, with more keys per shard than they read:

    url  nsamples                  as they have it; a url is relative to the index's folder
    filesize  sha256               of the file at the url; sha256 only where it was computed (compressed shards)
    digest                         of all that lies in it; a tar's: sha256 of its headers
    extensions                     how many members of each kind
    members                        the member table (data/formats/members.py), relative too
    damage                         what was wrong with the shard when it was indexed, in words; absent when nothing was

A sample's id is its shard's first id plus its row, so ids are dense, 0 .. N-1, need no metadata, and follow one another
where several data sets are listed. A sample that cannot be read keeps its id.
"""

import hashlib
import json
import os
import re
import stat
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.formats.members import ChangedShardError, Members, ShardReader
from amclr_scale.data.formats.shards import format_of, is_packed
from amclr_scale.data.formats.tar import BLOCK, TAR
from amclr_scale.data.sources import is_remote
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError

_MOST = 1 << 56  # of anything that is counted
_LONGEST = 4096  # characters of an address or a path
_FEW, _PER_BYTE = 10_000, 10  # samples of a small table; and for each byte of a larger one, where honest ones have 0.2
_OPEN_SHARDS = 128  # of which a process keeps the member table and the file


@dataclass(frozen=True)
class Shard:
    """One line of the index."""

    url: str
    num_samples: int
    members: Path
    digest: str
    extensions: dict[str, int]
    file_size: int | None = None
    sha256: str | None = None
    damage: tuple[str, ...] = ()


class Index:
    """The shards of one data set (or of several, one after another), and the ids of their samples."""

    def __init__(self, shards: Sequence[Shard], storage: Storage, parts: Sequence[int] | None = None):
        self.shards = list(shards)
        self.storage = storage
        self.open_shards = _OPEN_SHARDS
        self.parts = list(parts) if parts else [len(self.shards)]  # how many shards each data set has
        counts = [shard.num_samples for shard in self.shards]
        self.first_id: NDArray[np.int64] = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # (shards + 1,)
        self._bounds: list[int] = self.first_id.tolist()
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()

    @property
    def num_samples(self) -> int:
        """N."""
        return self._bounds[-1]

    @property
    def fingerprint(self) -> str:
        """Of the content: the same wherever the shards lie, different when any sample moved. 32 hex digits."""
        return self.fingerprint_of(slice(None))

    def fingerprint_of(self, shards: slice) -> str:
        """Of some shards' content, as an index of these alone would have it."""
        words = json.dumps([[shard.num_samples, shard.digest] for shard in self.shards[shards]])
        return hashlib.sha256(words.encode()).hexdigest()[:32]

    def locate(self, sample: int) -> tuple[int, int]:
        """The (shard, row) of an id."""
        shard = bisect_right(self._bounds, sample) - 1
        return shard, sample - self._bounds[shard]

    def part_of(self, sample: int) -> tuple[int, int]:
        """The first id of the data set that an id belongs to, and the first behind it."""
        shards = np.concatenate([[0], np.cumsum(self.parts)])
        bounds = self.first_id[shards].tolist()
        part = bisect_right(bounds, sample) - 1
        return bounds[part], bounds[part + 1]

    def reader(self, shard: int) -> ShardReader:
        """That shard, open; the least recently used of many is closed."""
        reader = self._readers.get(shard)
        if reader is None:
            entry = self.shards[shard]
            members = Members.load(entry.members)
            if len(members) != entry.num_samples:
                raise ChangedShardError(
                    f"{entry.url}: expected {entry.num_samples:,} samples (from the index), got a member table with "
                    f"{len(members):,}; index the shards again"
                )
            if members.digest != entry.digest:
                raise ChangedShardError(f"{entry.url}: {entry.members} is the table of another shard; index it again")
            file = self.storage.open(entry.url, entry.sha256)
            reader = format_of(entry.url).reader(entry.url, file, members)
            self._readers[shard] = reader
            if len(self._readers) > self.open_shards:
                self._readers.popitem(last=False)[1].close()
        else:
            self._readers.move_to_end(shard)
        return reader

    def close(self) -> None:
        """Close every file."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}  # another process opens its own files


def check_files(shards: Sequence[Shard], key: str) -> None:
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
            raise UserError(f"{key}: no such shard: {shard.url} ({error.strerror})") from error
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{key}: {shard.url}: expected a regular file, got a folder, a named pipe or a device")
        if shard.file_size is not None and size != shard.file_size:
            raise ChangedShardError(
                f"{key}: {shard.url}: expected {shard.file_size:,} bytes (from the index), got {size:,}: the shard has "
                "changed; restore it, or index the shards again and start a new run"
            )


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The shard list of an index file, checked for shape.

    Raises:
        UserError: it is not an index.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        entries = content["shardlist"]
        for entry in entries:
            check_entry(entry)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected an index (JSON with a `shardlist` of `url` and `nsamples`), got {error!r}; "
            "amclr-scale shards index writes one"
        ) from error
    if not entries:
        raise UserError(f"{path}: expected at least one shard in `shardlist`, got none")
    return list(entries)


def check_entry(entry: Any) -> None:
    """Raise `ValueError` unless every key of a shard's entry that we read is what it should be."""
    kinds: dict[str, Any] = {
        "url": str, "nsamples": int, "filesize": int, "sha256": str, "digest": str, "members": str, "extensions": dict,
        "damage": list,
    }  # fmt: skip
    shown = f"shard {str(entry)[:200]}"
    for key, kind in kinds.items():
        value = entry[key] if key in ("url", "nsamples") else entry.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ValueError(f"{key} of {shown}")
        if isinstance(value, int) and not 0 <= value < _MOST:
            raise ValueError(f"{key} of {shown}")
        if isinstance(value, str) and (not 0 < len(value) <= _LONGEST or "\0" in value):
            raise ValueError(f"{key} of {shown}")
    if entry["url"] is None or entry["nsamples"] is None:
        raise ValueError(shown)
    if entry.get("sha256") and not re.fullmatch("[0-9a-f]{64}", entry["sha256"]):  # it names a file in the cache
        raise ValueError(f"sha256 of {shown}")
    counts = (entry.get("extensions") or {}).values()
    if not all(type(count) is int and 0 <= count < _MOST for count in counts):
        raise ValueError(f"extensions of {shown}")
    if not all(isinstance(words, str) for words in entry.get("damage") or ()):
        raise ValueError(f"damage of {shown}")
    size = entry.get("filesize")
    if is_tar(entry["url"]) and size is not None and entry["nsamples"] * BLOCK > size:
        raise ValueError(f"{entry['nsamples']:,} samples in {size:,} bytes of {shown}")


def is_tar(url: str) -> bool:
    """Whether a shard is a tar that is not gzipped, in which each sample takes a header."""
    return format_of(url) is TAR and not is_packed(url) and not url.startswith("pipe:")


def check_table(shard: Shard) -> None:
    """Refuse a count of samples that a member table of its size can hardly hold, before memory is taken for them.

    Raises:
        UserError: naming the table.
    """
    packed = shard.members.stat().st_size
    if shard.num_samples > max(_FEW, _PER_BYTE * packed):
        raise UserError(
            f"{shard.url}: {shard.num_samples:,} samples cannot be in a member table of {packed:,} bytes "
            f"({shard.members}); index the shards again"
        )


def absolute(url: str, folder: Path) -> str:
    """A url of an index in `folder`."""
    return url if is_remote(url) or os.path.isabs(url) else str(folder / url)


def write_index(path: Path, name: str, shards: Sequence[Shard]) -> None:
    """Write the JSON, whole or not at all; urls and tables below its folder become relative."""

    def relative(place: str) -> str:
        below = not is_remote(place) and Path(place).is_relative_to(path.parent)
        return str(Path(place).relative_to(path.parent)) if below else place

    entries: list[dict[str, Any]] = []
    for shard in shards:
        entry: dict[str, Any] = {"url": relative(shard.url), "nsamples": shard.num_samples}
        entry |= {"filesize": shard.file_size} if shard.file_size is not None else {}
        entry |= {"sha256": shard.sha256} if shard.sha256 else {}
        entry |= {"digest": shard.digest, "extensions": shard.extensions, "members": relative(str(shard.members))}
        entry |= {"damage": list(shard.damage)} if shard.damage else {}
        entries.append(entry)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps({"wids_version": 1, "name": name, "shardlist": entries}, indent=1) + "\n", "utf-8")
    partial.replace(path)
