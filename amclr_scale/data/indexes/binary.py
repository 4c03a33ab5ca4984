"""The index of very many shards: the same content as the JSON form, in one file of which each process reads a part.

    bytes 0 .. 7     AMCLRIDX
    8 .. 15          version and length of the header, uint32 each
    header           JSON: shards, samples, fingerprints, sha256 of each column; then the header's own sha256, 32 bytes
    columns          num_samples (int64), file_size (int64, -1: unknown), flags (uint8), end and crc32 of each block
                     (int64, uint32), digest (32 bytes): a number for each shard, or block, little-endian
    blocks           of 64 shards each: zlib of a JSON list with what is left of their entries (url, members, ...)

Numbers that the order of samples needs are read and checked when the file is opened, 9 bytes per shard. Entries are
read block by block, where a shard of it is opened. Where everything lies follows from the number of shards alone.
"""

import hashlib
import json
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.formats.members import check_regular
from amclr_scale.data.indexes.entries import Shard, check_entry, entries_of, shard_of
from amclr_scale.data.indexes.shard_lists import Shards
from amclr_scale.data.sources import is_remote
from amclr_scale.errors import UserError

BINARY = ".bin"  # the ending of such a file
MANY = 10_000  # shards: beyond, the form that `amclr-scale shards index` writes by itself
MAGIC, VERSION = b"AMCLRIDX", 1
BLOCK = 64  # shards
REMOTE, LOOKED_AT, DAMAGED = 1, 2, 4  # flags; LOOKED_AT: the first shard that has such members
_START = struct.Struct("<8sII")
_COLUMNS = {"num_samples": "<i8", "file_size": "<i8", "flags": "u1", "end": "<i8", "crc": "<u4", "digest": "V32"}
_PER_BLOCK = ("end", "crc")
_HEADER, _LARGEST = 1 << 16, 1 << 20  # bytes of the header, and of one block's JSON, at most
_MOST_SHARDS, _MOST = 1 << 22, 1 << 56
_KEPT = 4  # parsed blocks


class BinaryShards(Shards):
    """What `write_binary_index` wrote; entries are read when they are asked for.

    Raises:
        UserError: there is no such file, or it is damaged, or was made by somebody who forged it.
    """

    def __init__(self, path: Path):
        self.path, self.folder = path, path.parent.absolute()
        self._blocks: OrderedDict[int, list[dict[str, Any]]] = OrderedDict()
        try:
            check_regular(path)
            with path.open("rb") as file:
                self._read_header(file)
            self._map = np.memmap(path, np.uint8, "r")
            self._check()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._refused(error) from error

    def __reduce__(self) -> tuple[Callable[[Path, bytes], "BinaryShards"], tuple[Path, bytes]]:
        return _same, (self.path, self._sum)  # another process maps the file itself

    def _refused(self, error: Exception) -> UserError:
        return UserError(
            f"{self.path}: expected an index that amclr-scale shards index wrote, got {error}; index the shards again"
        )

    def _read_header(self, file: Any) -> None:
        magic, version, length = _START.unpack(file.read(_START.size).ljust(_START.size, b"\0"))
        if magic != MAGIC:
            raise ValueError("a file of another kind")
        if version != VERSION:
            raise ValueError(f"version {version}, where this release reads {VERSION}")
        if length > _HEADER:
            raise ValueError(f"a header of {length:,} bytes")
        header = file.read(length)
        self._sum = hashlib.sha256(header).digest()  # of all content, as the header has sums of the rest
        if self._sum != file.read(32):
            raise ValueError("a damaged header")
        said = json.loads(header)
        if not isinstance(said, dict):
            raise ValueError("a header that is no JSON object")
        for key in ("shards", "samples"):
            if type(said[key]) is not int or not 0 <= said[key] < _MOST:
                raise ValueError(f"{key}: {str(said[key])[:100]}")
        if not 0 < said["shards"] <= _MOST_SHARDS:
            raise ValueError(f"{said['shards']:,} shards")
        for key, digits in (("fingerprint", 32), ("content", 12), *((name, 64) for name in _COLUMNS)):
            text = said[key]
            if not isinstance(text, str) or len(text) != digits or set(text) - set("0123456789abcdef"):
                raise ValueError(f"{key}: {str(text)[:100]}")
        self._said, self._size = said, said["shards"]
        self._places = dict[str, tuple[int, int]]()  # column -> its first byte, and how many numbers
        at = _START.size + length + 32
        for name, kind in _COLUMNS.items():
            count = -(-self._size // BLOCK) if name in _PER_BLOCK else self._size
            self._places[name] = at, count
            at += count * np.dtype(kind).itemsize
        self._first_block = at
        if at > os.fstat(file.fileno()).st_size:
            raise ValueError(f"{self._size:,} shards in {os.fstat(file.fileno()).st_size:,} bytes")

    def _view(self, name: str) -> NDArray[Any]:
        """A column, mapped."""
        at, count = self._places[name]
        kind = np.dtype(_COLUMNS[name])
        return self._map[at : at + count * kind.itemsize].view(kind)

    def _column(self, name: str) -> NDArray[Any]:
        """A column, whole and as it was written.

        Raises:
            ValueError: it is not.
        """
        at, count = self._places[name]
        view = self._map[at : at + count * np.dtype(_COLUMNS[name]).itemsize]
        if hashlib.sha256(view.tobytes()).hexdigest() != self._said[name]:
            raise ValueError(f"a damaged column ({name})")
        return np.array(view).view(_COLUMNS[name])

    def _check(self) -> None:
        """Raise `ValueError` unless the numbers that are read at once can be true."""
        counts = self.counts = self._column("num_samples").astype(np.int64)
        likely = counts.min() >= 0 and counts.sum(dtype=np.float64) < _MOST  # so that int64 holds the sum
        if not likely or int(counts.sum()) != self._said["samples"]:
            raise ValueError(f"numbers of samples that do not come to {self._said['samples']:,}")
        self.flags: NDArray[np.uint8] = self._column("flags")
        self._ends = self._column("end").astype(np.int64)
        self._sums = self._column("crc")
        steps = np.diff(self._ends, prepend=self._first_block)
        if (steps <= 0).any() or int(self._ends[-1]) != len(self._map):
            raise ValueError("blocks that do not fill the file")

    def __len__(self) -> int:
        return int(self._size)

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < self._size:
            raise IndexError(number)
        try:
            block, row = divmod(number, BLOCK)
            if block not in self._blocks:
                self._blocks[block] = self._parsed(block)
                if len(self._blocks) > _KEPT:
                    self._blocks.popitem(last=False)
            entry = {**self._blocks[block][row], "nsamples": int(self.counts[number])}
            entry["digest"] = self._view("digest")[number].tobytes().hex()
            size = int(self._view("file_size")[number])
            entry |= {} if size == -1 else {"filesize": size}
            check_entry(entry)
            if entry.get("members") is None or entry.get("extensions") is None:
                raise ValueError(f"no member table for shard {number}")
            if is_remote(entry["url"]) != bool(self.flags[number] & REMOTE):
                raise ValueError(f"an address of another kind for shard {number}")
            return shard_of(entry, self.folder)
        except (OSError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
            raise self._refused(error) from error

    def _parsed(self, block: int) -> list[dict[str, Any]]:
        begin = int(self._ends[block - 1]) if block else self._first_block
        packed = self._map[begin : int(self._ends[block])].tobytes()
        if zlib.crc32(packed) != int(self._sums[block]):
            raise ValueError(f"a damaged block ({block})")
        unpacker = zlib.decompressobj()
        text = unpacker.decompress(packed, _LARGEST)
        if not unpacker.eof or unpacker.unused_data:
            raise ValueError(f"a block ({block}) that is not what a run of shards index writes")
        entries = json.loads(text)
        expected = min(BLOCK, self._size - block * BLOCK)
        if not isinstance(entries, list) or len(entries) != expected:
            raise ValueError(f"a block ({block}) of other than {expected} shards")
        if not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"a block ({block}) of other things than shards")
        return entries

    @cached_property
    def remote(self) -> NDArray[np.bool_]:
        return (self.flags & REMOTE).astype(bool)

    @cached_property
    def file_sizes(self) -> NDArray[np.int64]:
        try:
            return self._column("file_size").astype(np.int64)
        except ValueError as error:
            raise self._refused(error) from error

    def looked_at(self) -> list[Shard]:
        return [self[number] for number in np.flatnonzero(self.flags & LOOKED_AT).tolist()]

    def damaged(self) -> Iterator[Shard]:
        return (self[number] for number in np.flatnonzero(self.flags & DAMAGED).tolist())

    def pairs(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        try:
            digests = self._column("digest")
        except ValueError as error:
            raise self._refused(error) from error
        for number in range(start, stop):
            yield int(self.counts[number]), digests[number].tobytes().hex()

    def fingerprint_of(self, start: int, stop: int) -> str:
        whole = (start, stop) == (0, self._size)
        return str(self._said["fingerprint"]) if whole else super().fingerprint_of(start, stop)

    def content(self) -> str:
        return str(self._said["content"])


def _same(path: Path, header: bytes) -> BinaryShards:
    """The index that another process has opened.

    Raises:
        UserError: it has been written anew meanwhile: its samples may have other ids.
    """
    found = BinaryShards(path)
    if found._sum != header:
        raise UserError(f"{path}: expected the index that this run began with, got another one; start the run again")
    return found


def write_binary_index(path: Path, shards: Sequence[Shard]) -> None:
    """Write the file, whole or not at all; urls and tables below its folder become relative.

    Raises:
        UserError: a shard does not fit this form.
    """
    listed = Shards(shards)
    flags, seen = np.zeros(len(shards), np.uint8), set[tuple[tuple[str, bool], ...]]()
    for number, shard in enumerate(shards):
        kind = shard.kind
        first = bool(shard.num_samples) and kind not in seen
        seen |= {kind} if first else set()
        flags[number] = REMOTE * is_remote(shard.url) | LOOKED_AT * first | DAMAGED * bool(shard.damage)
    blocks = list[bytes]()
    for begin in range(0, len(shards), BLOCK):
        entries = entries_of(shards[begin : begin + BLOCK], path.parent)
        for entry in entries:
            for key in ("nsamples", "filesize", "digest"):
                entry.pop(key, None)
        text = json.dumps(entries, separators=(",", ":")).encode()
        if len(text) > _LARGEST:
            raise UserError(
                f"{path}: what is known of shards {begin:,} to {begin + len(entries) - 1:,} takes {len(text):,} bytes, "
                f"more than {_LARGEST:,}; write an index.json (--out)"
            )
        blocks.append(zlib.compress(text, 9))
    columns: dict[str, NDArray[Any]] = {
        "num_samples": listed.counts,
        "file_size": listed.file_sizes,
        "flags": flags,
        "end": np.cumsum([len(block) for block in blocks]),
        "crc": np.array([zlib.crc32(block) for block in blocks]),
        "digest": np.array([_digest(path, shard) for shard in shards]).astype("V32"),
    }

    def header_of(first_block: int) -> bytes:
        ends = {**columns, "end": columns["end"] + first_block}
        sums = {name: hashlib.sha256(ends[name].astype(form).tobytes()).hexdigest() for name, form in _COLUMNS.items()}
        said = {"shards": len(shards), "samples": int(listed.counts.sum()), "content": listed.content(),
                "fingerprint": listed.fingerprint_of(0, len(shards))}  # fmt: skip
        return json.dumps({**said, **sums}).encode()

    length = len(header_of(0))  # sums have one length
    total = sum(columns[name].size * np.dtype(form).itemsize for name, form in _COLUMNS.items())
    first_block = _START.size + length + 32 + total
    header = header_of(first_block)
    columns["end"] = columns["end"] + first_block
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as file:
        file.write(_START.pack(MAGIC, VERSION, length) + header + hashlib.sha256(header).digest())
        for name, form in _COLUMNS.items():
            file.write(columns[name].astype(form).tobytes())
        file.writelines(blocks)
    partial.replace(path)


def _digest(path: Path, shard: Shard) -> bytes:
    try:
        found = bytes.fromhex(shard.digest)
    except ValueError:
        found = b""
    if len(found) != 32 or found.hex() != shard.digest:
        raise UserError(f"{path}: {shard.url}: its digest is no sha256, {shard.digest!r}; write an index.json (--out)")
    return found
