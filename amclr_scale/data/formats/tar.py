"""Where every member of a tar lies, found once by reading its headers and nothing else.

The scanner is strict where tar libraries are lenient: they stop without a word at the first header that does not
parse, and every sample behind it is lost. This one says at which byte, and goes on from the next header that is whole.
It also says so where the mark that ends every archive is missing, or where another archive follows it.

Samples follow the webdataset convention: neighbouring members that share a path up to the first dot of their file
name are one sample, and the rest of the name, in lower case, says what the member is.
"""

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from amclr_scale.data.formats.members import ChangedShardError, Flag, Members, ShardFormat, check_regular
from amclr_scale.errors import UserError

BLOCK = 512
_ZEROS = bytes(BLOCK)
_FILES = b"0\x007"  # the type flags of regular files
_HARD_LINK = b"1"
_LONGEST = 1 << 20  # bytes of a long name or an extended header; more are taken for damage
_TOLD = 100  # places of damage that are named one by one


@dataclass(frozen=True)
class _Member:
    name: str
    offset: int
    size: int
    header: int
    cut: bool  # the file ends inside its data


def _number(digits: bytes) -> int:
    """A header's number: octal, or GNU's base-256 for sizes past 8 GiB.

    Raises:
        ValueError: it is neither, or negative.
    """
    if digits[0] & 0x80:
        if digits[0] & 0x40:
            raise ValueError("a negative number")
        return int.from_bytes(digits[1:], "big") | (digits[0] & 0x7F) << (8 * (len(digits) - 1))
    text = digits.split(b"\0", 1)[0].strip(b" ")
    if text.strip(b"01234567"):
        raise ValueError(f"{text!r} is no octal number")
    return int(text or b"0", 8)


def _is_header(block: bytes) -> bool:
    if len(block) < BLOCK:
        return False
    try:
        written = _number(block[148:156])
    except ValueError:
        return False
    return written == sum(block) - sum(block[148:156]) + 8 * ord(" ")


def _text(raw: bytes) -> str:
    return raw.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, str]:
    """The records `length key=value` of an extended header.

    Raises:
        ValueError: it has others.
    """
    records: dict[str, str] = {}
    while data:
        digits, space, _ = data.partition(b" ")
        length = int(digits)
        if not space or not len(digits) + 1 < length <= len(data):
            raise ValueError(f"a record of {length} bytes")
        key, _, value = data[len(digits) + 1 : length].rstrip(b"\n").partition(b"=")
        records[key.decode()] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return records


class _Scanner:
    def __init__(self, data: "mmap.mmap | bytes"):
        self.data, self.end = data, len(data)
        self.hash = hashlib.sha256()
        self.damage: list[str] = []
        self.untold = 0  # further places of damage
        self.headers = 0

    def tell(self, words: str) -> None:
        """Note a place of damage."""
        if len(self.damage) < _TOLD:
            self.damage.append(words)
        else:
            self.untold += 1

    def members(self) -> Iterator[_Member]:
        at, records = 0, dict[str, str]()
        long = {b"L": "", b"K": ""}  # GNU's long name and long link of the member that follows
        last: _Member | None = None
        known: dict[str, _Member] = {}  # by name, for the hard links that follow
        ended = False
        while at + BLOCK <= self.end:
            block = self.data[at : at + BLOCK]
            if block == _ZEROS and self.data[at + BLOCK : at + 2 * BLOCK] in (_ZEROS, b""):
                ended = True
                break
            kind, data_at = block[156:157], at + BLOCK
            extended = records.get("size") if kind in _FILES else None
            size = self._size(at, block, extended) if _is_header(block) else None
            if size is None:
                resumed = self._next_header(at + BLOCK)
                self.tell(f"no valid tar header at byte {at:,}, {resumed - at:,} bytes skipped")
                at, long, records = resumed, {b"L": "", b"K": ""}, {}
                continue
            self.hash.update(block)
            self.headers += 1
            at = data_at + -(-size // BLOCK) * BLOCK
            if kind in b"LKx" and size > _LONGEST:
                self.tell(f"a name or an extended header of {size:,} bytes at byte {data_at:,}, ignored")
                at = data_at if at > self.end else at  # no such data can be there: members may be
            elif kind in long:
                long[kind] = _text(self.data[data_at : data_at + size])
            elif kind == b"x":
                try:
                    records = _pax(self.data[data_at : data_at + size])
                except ValueError:  # of the short name and size in the member's own header nothing is lost
                    self.tell(f"no valid extended header at byte {data_at:,}, ignored")
            else:
                prefix = _text(block[345:500]) if block[257:262] == b"ustar" and block[262:263] == b"\0" else ""
                name = records.get("path") or long[b"L"] or (f"{prefix}/" if prefix else "") + _text(block[:100])
                if kind in _FILES:
                    here = min(size, self.end - data_at)
                    last = known[name] = _Member(name, data_at, here, zlib.crc32(block), size > here)
                    yield last
                elif kind == _HARD_LINK:
                    yield from self._linked(name, records.get("linkpath") or long[b"K"] or _text(block[157:257]), known)
                long, records = {b"L": "", b"K": ""}, {}
        self._say_how_it_ends(last, at, ended=ended)

    def _size(self, at: int, block: bytes, extended: str | None) -> int | None:
        """Bytes of what follows a header, by the extended header in front of it or by itself; None: it says none."""
        if extended is not None:
            if extended.isascii() and extended.isdecimal() and len(extended) < 20:
                return int(extended)
            self.tell(f"{extended[:40]!r} is no size of the member at byte {at:,}, its own header's is taken")
        try:
            return _number(block[124:136])
        except ValueError:
            return None

    def _linked(self, name: str, target: str, known: dict[str, _Member]) -> Iterator[_Member]:
        """A hard link: the bytes of an earlier member under another name."""
        if target in known:
            yield replace(known[target], name=name)
        else:
            self.tell(f"{name} is a hard link to {target}, which is not in the file before it")

    def _say_how_it_ends(self, last: _Member | None, at: int, *, ended: bool) -> None:
        if self.untold:
            self.damage.append(f"and so at {self.untold:,} further places")
        if last and last.cut:
            self.damage.append(f"the file ends at byte {self.end:,}, inside {last.name}")
        elif self.end % BLOCK:
            self.damage.append(f"the file ends at byte {self.end:,}, inside a header or padding")
        elif not ended:
            self.damage.append(f"the file ends at byte {self.end:,} without the mark of an end: it may be cut")
        elif (behind := self._next_header(at + BLOCK)) < self.end:
            self.damage.append(f"another archive begins at byte {behind:,}, behind the end of this one: it is not read")

    def _next_header(self, at: int) -> int:
        while at + BLOCK <= self.end:
            block = self.data[at : at + BLOCK]
            if block != _ZEROS and _is_header(block):
                return at
            at += BLOCK
        return self.end


RULE = "the key ends at the first dot of a file's name: use _ or - instead of dots in names, but for the last"


def split_name(name: str) -> tuple[str, str]:
    """A member's name as (key, extension): `a/b.c.webp` is sample `a/b`, member `c.webp`."""
    folder, slash, file = name.rpartition("/")
    key, _, extension = file.partition(".")
    return folder + slash + key, extension.lower()


def scan(path: Path) -> Members:
    """The member table of the (uncompressed) tar at `path`; damage is recorded, not raised.

    Raises:
        UserError: the file cannot be read, is no regular file, or no tar at all.
    """
    try:
        check_regular(path)
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if length else b""
            return _table(_Scanner(data), path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _table(scanner: _Scanner, path: Path) -> Members:
    extensions: dict[str, int] = {}
    row_start, flags, columns = [0], list[int](), list[tuple[int, int, int, int]]()
    seen: dict[str, set[str]] = {}
    apart: dict[str, str] = {}  # samples whose members are not neighbours, and a member of each that lies elsewhere
    current, present = None, set[str]()
    for member in scanner.members():
        key, extension = split_name(member.name)
        if not extension or key.rpartition("/")[2][:1] in ("", ".") or member.name.startswith("__"):
            continue  # no sample: a note, a dot file, webdataset's own
        if key != current or extension in present:
            if current is not None:
                row_start.append(len(columns))
            flags.append(Flag.DUPLICATE_KEY if key in seen else Flag.WHOLE)
            if key in seen and extension not in seen[key]:
                apart.setdefault(key, member.name)
            current, present = key, set()
            seen.setdefault(key, present)
        present.add(extension)
        columns.append((member.offset, member.size, member.header, extensions.setdefault(extension, len(extensions))))
        if member.cut:
            flags[-1] = Flag.CUT
    if columns:
        row_start.append(len(columns))
    elif scanner.end and scanner.damage and not scanner.headers:
        raise UserError(
            f"{path}: expected a tar of samples, got a file without any; is it complete, or another format?"
        )
    if len(extensions) > 256:
        raise UserError(
            f"{path}: expected samples of like members, got {len(extensions)} different extensions, such as "
            f"{', '.join(f'.{one}' for one in list(extensions)[:3])}; {RULE}"
        )
    if len(apart) > len(seen) / 2:
        raise UserError(
            f"{path}: expected the members of a sample side by side, got {next(iter(apart.values()))} apart from the "
            f"others of its sample, and so in {len(apart):,} of {len(seen):,} samples; sort the members by name "
            "(tar --sort=name)"
        )
    if apart:
        scanner.damage.append(
            f"{len(apart):,} samples have members apart from the others, the first is {next(iter(apart.values()))}: "
            "what lies apart is left out; sort the members by name (tar --sort=name)"
        )
    table = np.array(columns, dtype=np.int64).reshape(-1, 4)
    return Members(
        row_start=np.array(row_start, dtype=np.int64),
        offset=table[:, 0].copy(),
        size=table[:, 1].copy(),
        header=table[:, 2].astype(np.uint32),
        extension=table[:, 3].astype(np.uint8),
        flag=np.array(flags, dtype=np.uint8),
        extensions=list(extensions),
        digest=scanner.hash.hexdigest(),
        damage=scanner.damage,
        length=scanner.end,
    )


class TarReader:
    """One open tar, a `ShardReader`: a `pread` for each member, with the header in front of it."""

    def __init__(self, url: str, file: int, members: Members):
        self.url, self._file, self.members = url, file, members
        inside = (members.offset >= BLOCK) & (members.offset <= (end := os.fstat(file).st_size))
        whole = members.size <= end - members.offset
        cut = np.repeat(members.flag == Flag.CUT, np.diff(members.row_start))  # never read
        if not (inside & whole | cut).all():
            os.close(file)
            raise ChangedShardError(
                f"{url}: its member table has places that are not inside the {end:,} bytes of the shard; index it again"
            )

    def read(self, row: int, wanted: frozenset[str]) -> dict[str, bytes]:
        """Extension -> bytes of those members of a sample that are there and wanted.

        Raises:
            ChangedShardError: a header is not the one that was indexed, or the file ends before.
            UserError: the file cannot be read any more.
        """
        found = self.members.of_row(row)
        return {extension: self._member(row, *found[extension]) for extension in found if extension in wanted}

    def _member(self, row: int, offset: int, size: int, header: int) -> bytes:
        try:
            data = os.pread(self._file, BLOCK + size, offset - BLOCK)
        except OSError as error:  # a file server that went away
            raise UserError(f"{self.url}: sample {row} cannot be read: {error.strerror or error}") from error
        if len(data) != BLOCK + size or zlib.crc32(data[:BLOCK]) != header:
            raise ChangedShardError(
                f"{self.url}: sample {row} is not where the index says: the shard has changed since it was indexed; "
                "restore it, or index the shards again and start a new run"
            )
        return data[BLOCK:]

    def key(self, row: int) -> str:
        """The sample's key, for messages."""
        first = int(self.members.offset[self.members.row_start[row]])
        name = os.pread(self._file, 100, first - BLOCK).split(b"\0", 1)[0]
        return split_name(name.decode("utf-8", "replace"))[0]

    def close(self) -> None:
        os.close(self._file)


TAR = ShardFormat(scan, TarReader)
