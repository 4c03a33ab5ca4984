"""Shards that are not on a file system: fetched whole, once per machine, into a folder that is kept below a bound.

    http(s)://    the standard library
    s3:// gs:// hf:// ...    fsspec, with the package that its protocol needs
    ais:// htgs:// scp:// ...    webdataset's own openers, of what fsspec does not know
    pipe:COMMAND    what the shell command prints; only with data.allow_pipe

All of them are read front to back, so a store that allows nothing else is enough. Each shard is fetched by the first
process of the machine that needs it, tried again with growing pauses when that fails, and appears whole or not at all.
The least recently used shards are removed first; a process that is still reading one keeps it until it is done.
"""

import contextlib
import gzip
import importlib
import io
import logging
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from amclr_scale.addresses import masked
from amclr_scale.data.sources import names_protocol
from amclr_scale.disk import check_room, is_full, unwritten
from amclr_scale.distributed import preparing
from amclr_scale.errors import AbsentDataError, UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

ATTEMPTS = 5
FIRST_PAUSE = 1.0  # seconds; each further pause is twice as long
TIMEOUT = 60.0  # seconds without a byte, and over which the rate is measured
LEAST = 4096  # bytes per second: less counts as a store that does not answer
LARGEST = 1 << 40  # bytes of a shard, unpacked, where nobody says otherwise
_COPY = 1 << 20
_NEVER_THERE = (401, 403, 404, 410)  # trying again does not help


class _PermanentError(Exception):
    """A failure that will be the same next time."""


class LargeShardError(UserError):
    """A shard is larger than the user allows."""


_FINAL = (_PermanentError, LargeShardError, FileNotFoundError, PermissionError)


class GaveUpError(Exception):
    """The last attempt failed too; `str()` says after how many, and why."""


def persist(what: str, attempt: Callable[[], T]) -> T:
    """Call something that talks to a store, again with growing pauses when it fails and may not the next time.

    Args:
        what: it is about, for the log.

    Raises:
        GaveUpError: the last attempt failed too, or one in a way that will be the same next time.
    """
    pause = FIRST_PAUSE
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except Exception as error:  # the libraries behind fsspec have errors of their own
            words = masked(str(error)) or type(error).__name__
            if number == ATTEMPTS or isinstance(error, _FINAL) or is_full(error):
                raise GaveUpError(("" if number == 1 else f" after {number} attempts") + f": {words}") from error
            log.warning("%s: %s; attempt %d of %d in %g s", masked(what), words, number + 1, ATTEMPTS, pause)
            time.sleep(pause)
            pause *= 2
    raise AssertionError


@contextlib.contextmanager
def _opened(url: str) -> Iterator[tuple[IO[bytes], int | None]]:
    """A stream of the bytes at `url`, and how many there are where the store says so."""
    if url.startswith("pipe:"):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            yield process.stdout, None
        if process.returncode:
            raise OSError(f"the command ended with exit code {process.returncode}")
    elif url.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT) as answer:
                length = answer.headers.get("Content-Length")
                yield answer, int(length) if length else None
        except urllib.error.HTTPError as error:
            if error.code in _NEVER_THERE:
                raise _PermanentError(str(error)) from error
            raise
        except LargeShardError:  # of whoever reads
            raise
        except ValueError as error:
            raise _PermanentError(str(error)) from error
    else:
        with _fsspec(url) as file:
            yield file, getattr(file, "size", None)


def _fsspec(url: str) -> Any:
    if not names_protocol(url):  # an index may say so; libraries would take it for a path
        raise _PermanentError("expected an address with its protocol, such as s3://")
    try:
        fsspec = importlib.import_module("fsspec")

        return fsspec.open(url, "rb")
    except (ImportError, ValueError) as error:  # the package of a protocol is missing, or there is no such protocol
        from webdataset.gopen import gopen, gopen_schemes  # here alone: it imports torch

        if url.partition("://")[0] in gopen_schemes:  # they run a program by its name, none of them a shell
            return gopen(url, "rb")
        raise _PermanentError(str(error)) from error


def write_bounded(source: Any, out: IO[bytes], url: str, largest: int, done: str = "") -> None:
    """Copy a stream, as long as it is no larger than a shard may be.

    Args:
        done: what its bytes are counted as, for ranks that wait; "": they are counted already.

    Raises:
        LargeShardError: it is larger; nothing beyond the bound has been written.
    """
    left = largest
    while part := source.read(_COPY):
        left -= len(part)
        if left < 0:
            raise LargeShardError(
                f"data.max_shard_gib: expected shards of at most {largest / 2**30:.3g} GiB, also when unpacked, got a "
                f"larger one: {url}; raise it if that is how large it is meant to be"
            )
        out.write(part)
        if done:
            preparing.advance(done, len(part))


def _copy(url: str, target: Path, largest: int) -> None:
    """One attempt; a gzipped shard is unpacked on the way."""
    with _opened(url) as (stream, length), target.open("wb") as out:
        check_room(target.parent, length or 0, url)  # at least: it may be packed
        counted = _Counted(stream, least=0 if url.startswith("pipe:") else LEAST)  # a command takes its time
        head = counted.read(1)
        head += counted.read(1) if head else b""
        source: Any = _Joined(head, counted)
        with gzip.open(source) if head == b"\x1f\x8b" else contextlib.nullcontext(source) as plain:
            write_bounded(plain, out, url, largest)
    if not counted.total:  # only now: a command's exit code says more
        raise OSError("no data")
    if length is not None and counted.total != length:
        raise OSError(f"{counted.total:,} of {length:,} bytes")


class _Counted:
    """Counts the bytes of a stream, which have to come at a rate of `least` per second."""

    def __init__(self, stream: IO[bytes], least: int):
        self.stream, self.total, self.least = stream, 0, least
        # What is there, where a stream tells: else a store that sends a byte now and then is waited for by the MiB.
        self._some = getattr(stream, "read1", stream.read)
        self._since, self._before = time.monotonic(), 0

    def read(self, size: int) -> bytes:
        part: bytes = self._some(size)
        self.total += len(part)
        preparing.advance("bytes fetched", len(part))
        if (waited := time.monotonic() - self._since) > TIMEOUT and part:
            came, least = self.total - self._before, self.least * waited
            if came < least:
                raise OSError(f"{came:,} bytes in {waited:.0f} s: slower than {self.least:,} per second")
            self._since, self._before = time.monotonic(), self.total
        return part


class _Joined(io.RawIOBase):
    """Some bytes, then the rest of a stream."""

    def __init__(self, head: bytes, rest: _Counted):
        self.head, self.rest = head, rest

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        part, self.head = self.head, b""
        return part or self.rest.read(size if size >= 0 else _COPY)


def partial_of(target: Path) -> Path:
    """Where a file is written before it is whole; what a killed process has left there is written over."""
    return target.with_name(f".{target.name}.part")


def fetch(url: str, target: Path, largest: int = LARGEST, key: str = "data.cache") -> None:
    """Bring the tar at `url` to `target`, whole or not at all, with several attempts. One process at a time.

    Args:
        largest: bytes that it may have, unpacked.
        key: that says where `target` is.

    Raises:
        LargeShardError: it has more.
        UserError: the last attempt failed too, or the disk is full.
    """
    partial = partial_of(target)

    def attempt() -> None:
        try:
            _copy(url, partial, largest)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    try:
        persist(url, attempt)
    except GaveUpError as error:
        if isinstance(error.__cause__, LargeShardError):
            raise error.__cause__ from None
        if isinstance(error.__cause__, OSError) and is_full(error.__cause__):
            raise unwritten(error.__cause__, key, target.parent, ", or lower data.cache_gib") from error
        raise AbsentDataError(
            f"{url}: cannot be fetched{error}; check the address, the permissions and the network"
        ) from error


def make_room(folders: Iterable[Path], limit: int, keep: Path) -> None:
    """Remove the least recently used shards of these folders until they take at most `limit` bytes; never `keep`."""
    found = []
    for path in (path for folder in folders for path in folder.glob("*.tar")):
        with contextlib.suppress(FileNotFoundError):  # another process makes room too
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in found)
    for _, size, path in sorted(found):
        if total <= limit:
            break
        if path != keep:
            path.unlink(missing_ok=True)
            total -= size
