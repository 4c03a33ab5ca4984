"""From a shard's address to bytes: a local file to read anywhere in, whatever the shard is stored as.

* A shard on a file system is read where it lies.
* One that is gzipped (.tar.gz) is unpacked into the cache folder.
* A remote shard is fetched into the cache folder (`data/remote.py`); or, with `data.stream`, into memory
  (`data/streaming.py`).

Both count towards the bound on the cache folder: what was not used for longest goes first.

Everything then is the same: the format of the shard (data/formats/shards.py) reads members where its table says. Cached
files appear whole or not at all, and processes that want the same file at once wait for the one that makes it.
"""

import contextlib
import fcntl
import gzip
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from amclr_scale.config import schema
from amclr_scale.data.formats.members import ChangedShardError, check_regular
from amclr_scale.data.formats.shards import is_packed
from amclr_scale.data.remote import LARGEST, fetch, make_room, partial_of, write_bounded
from amclr_scale.data.sources import is_remote
from amclr_scale.data.streaming import Stream
from amclr_scale.disk import FullDiskError, check_room, free_at, is_full, unwritten
from amclr_scale.distributed import preparing
from amclr_scale.errors import AbsentDataError, UserError

_COPY = 1 << 20  # bytes per read while copying
FETCHED, UNPACKED = "fetched", "unpacked"  # folders in the cache


def cache_folder(configured: str | None, key: str = "data.cache") -> Path:
    """`data.cache`, or $XDG_CACHE_HOME/amclr_scale, or ~/.cache/amclr_scale; made if need be.

    Args:
        key: that says where it is, for messages.

    Raises:
        UserError: it cannot be written.
    """
    named = key if configured or key == "XDG_CACHE_HOME" else f"{key}, or the variable XDG_CACHE_HOME,"
    try:
        if configured:
            folder = Path(configured).expanduser()
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "amclr_scale"
    except RuntimeError:  # as in containers under a number that is nobody's
        raise UserError(
            f"{key}: expected a user with a home folder, got none; set {named} to a folder that can be written"
        ) from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("not writable")
    except OSError as error:
        raise UserError(
            f"{key}: expected a folder that can be written, got {folder} ({error.strerror or error}); set {named} to "
            "another one"
        ) from error
    return folder


@contextlib.contextmanager
def locked(path: Path, key: str = "data.cache") -> Iterator[None]:
    """Only one process of the machine is inside for a given path. The lock dies with its process; the folder exists.

    Args:
        key: that says where the path is, for messages.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        opened = lock.open("wb")
    except OSError as error:
        raise unwritten(error, key, lock.parent) from error
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:  # some network file systems
            raise UserError(
                f"{key}: {lock.parent} has no file locks ({error.strerror}); set {key} to a local disk"
            ) from error
        yield


def address_key(url: str) -> str:
    """A name for what is at `url` now: of a local file, it changes when the file does."""
    words = url
    if not is_remote(url):
        status = os.stat(url)
        words = f"{os.path.abspath(url)} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(words.encode("utf-8", "surrogateescape")).hexdigest()


def unpack(url: str, target: Path, sha256: str | None, largest: int = LARGEST) -> None:
    """Write the shard inside the gzipped file at `url` to `target`, whole or not at all.

    Args:
        largest: bytes that it may have, unpacked.

    Raises:
        LargeShardError: it has more.
        ChangedShardError: the file's checksum is not `sha256`.
        UserError: it is damaged, or the disk is full.
    """
    partial = partial_of(target)
    checksum = hashlib.sha256()
    try:
        with open(url, "rb") as packed:
            while part := packed.read(_COPY):
                checksum.update(part)
                preparing.advance("bytes hashed", len(part))
            if sha256 and checksum.hexdigest() != sha256:
                raise ChangedShardError(
                    f"{url}: expected sha256 {sha256} (from the index), got {checksum.hexdigest()}: the shard has "
                    "changed; restore it, or index the shards again and start a new run"
                )
            check_room(target.parent, packed.tell(), url)  # at least
            packed.seek(0)
            with gzip.open(packed) as stream, partial.open("wb") as out:
                write_bounded(stream, out, url, largest, "bytes unpacked")
        partial.replace(target)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and is_full(error):
            raise unwritten(error, "data.cache", target.parent, ", or lower data.cache_gib") from error
        raise UserError(f"{url}: cannot be unpacked into {target.parent}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


class Storage:
    """Where shards become local files.

    Args:
        cache: folder for what is unpacked or fetched.
        cached_bytes: bound on what is in it; None: there is none.
        allow_pipe: whether `pipe:` urls may run their shell commands.
        stream: memory for fetched shards, instead of the cache folder.
        largest: bytes that a shard may have when it is unpacked or fetched.

    Attributes:
        fetched_bytes: bound on the fetched shards.
    """

    def __init__(
        self, cache: Path, cached_bytes: int | None = None, allow_pipe: bool = False, stream: Stream | None = None,
        largest: int = LARGEST,
    ):  # fmt: skip
        self.cache, self.cached_bytes, self.allow_pipe, self.stream = cache, cached_bytes, allow_pipe, stream
        self.largest = largest
        # Of a stream: one shard at a time, until a loader knows how many it needs at once.
        self.fetched_bytes = 0 if stream else cached_bytes

    def local_path(self, url: str, sha256: str | None = None) -> Path:
        """A local, uncompressed file with the shard's content; unpacks or fetches it first if need be.

        Raises:
            UserError: there is no such shard, or it cannot be unpacked or fetched.
        """
        if is_remote(url):
            return self._fetched(url)
        if not os.path.exists(url):
            raise AbsentDataError(f"{url}: no such shard; check data.train and the index that names it")
        check_regular(url)
        if not is_packed(url):
            return Path(url)
        target = self.cache / UNPACKED / f"{sha256 or address_key(url)}.tar"
        try:
            os.utime(target)  # used now: the last to be removed
        except FileNotFoundError:
            target.parent.mkdir(parents=True, exist_ok=True)
            with locked(target):
                if not target.exists():
                    self._with_room(lambda: unpack(url, target, sha256, self.largest))
            self._make_room(target, self.cached_bytes)
        return target

    def check_room(self, shards: Iterable[tuple[str, int]], total: int) -> None:
        """Refuse a disk that would be full before the cache has come to its bound. Of memory, see `Stream`.

        Args:
            shards: urls and bytes of all remote ones that will be read; looked at only where room is short.
            total: their bytes.

        Raises:
            UserError: naming data.cache_gib.
        """
        if self.stream or self.cached_bytes is None:
            return
        held = dict[str, int]()
        for folder in (self.cache / FETCHED, self.cache / UNPACKED):
            for path in folder.glob("*") if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):  # other processes make room
                    held[path.name] = path.stat().st_size
        free, here = free_at(self.cache), sum(held.values())
        growth = min(total, max(0, self.cached_bytes - here))
        if growth <= free:
            return
        growth = min(growth, sum(size for url, size in shards if f"{address_key(url)}.tar" not in held))
        if growth > free:
            most = (here + free) / 2**30
            raise UserError(
                f"data.cache_gib: expected {growth / 2**30:.3g} GiB free in {self.cache} for the shards that the cache "
                f"will come to hold, got {free / 2**30:.3g}; set data.cache_gib to {most:.3g} or less, make room, "
                "or set data.cache to a larger disk"
            )

    def forget(self, url: str) -> None:
        """Remove what was fetched of a shard, which has turned out to be damaged: the next one may be whole."""
        if is_remote(url) and not self.stream:
            (self.cache / FETCHED / f"{address_key(url)}.tar").unlink(missing_ok=True)

    def _with_room(self, write: Callable[[], None]) -> None:
        """Write a shard; where the disk is full, the cache's own make room, the least recently used ones first."""
        while True:
            try:
                return write()
            except FullDiskError:
                if self.stream or not self._remove_oldest():
                    raise

    def _remove_oldest(self) -> bool:
        ages = dict[Path, int]()
        for path in (path for name in (FETCHED, UNPACKED) for path in (self.cache / name).glob("*.tar")):
            with contextlib.suppress(FileNotFoundError):  # another process makes room too
                ages[path] = path.stat().st_mtime_ns
        if ages:
            min(ages, key=lambda path: ages[path]).unlink(missing_ok=True)
        return bool(ages)

    def _make_room(self, keep: Path, limit: int | None) -> None:
        folders = [self.cache / name for name in (FETCHED, UNPACKED)]
        if limit is not None:
            make_room(folders if keep.parent in folders else [keep.parent], limit, keep)

    def open(self, url: str, sha256: str | None = None) -> int:
        """A descriptor of that file, to be closed by the caller.

        Raises:
            UserError: as `local_path`; or the file cannot be opened.
        """
        while True:
            path = self.local_path(url, sha256)
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # another process made room in the cache between the two lines above
            except OSError as error:
                raise UserError(f"{url}: cannot be opened: {error.strerror or error}") from error

    def _fetched(self, url: str) -> Path:
        if url.startswith("pipe:") and not self.allow_pipe:
            raise UserError(
                f"data.allow_pipe: {url} would run a shell command; set data.allow_pipe=true if you trust its author"
            )
        folder = self.stream.folder() if self.stream else self.cache / FETCHED
        if not self.stream:  # a stream that is closed meanwhile takes its folder with it
            folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{address_key(url)}.tar"
        try:
            os.utime(target)  # used now: the last to be removed
        except FileNotFoundError:
            with locked(target):
                if not target.exists():
                    key = "data.stream" if self.stream else "data.cache"
                    self._with_room(lambda: fetch(url, target, self.largest, key))
            self._make_room(target, self.fetched_bytes)
        return target


def make_storage(data: schema.Data) -> Storage:
    """The storage that a recipe's section describes.

    Raises:
        UserError: the cache folder cannot be written.
    """
    bound, largest = (int(gib * 2**30) for gib in (data.cache_gib, data.max_shard_gib))
    return Storage(cache_folder(data.cache), bound, data.allow_pipe, Stream() if data.stream else None, largest)
