"""Open the index of what a configuration names, and write one where there is none.

Indexing reads every tar's headers once. An index that training makes by itself goes to the cache folder, never beside
the user's shards; `amclr-scale shards index` puts it there on purpose, for everybody. Each shard's member table is
written as soon as it is known, so an interrupted run goes on where it stopped.
"""

import hashlib
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from amclr_scale.addresses import masked
from amclr_scale.config import schema
from amclr_scale.data.formats.members import ChangedShardError, Flag, Members
from amclr_scale.data.formats.shards import format_of, is_packed
from amclr_scale.data.formats.tar import RULE
from amclr_scale.data.index import Index, check_files, check_table
from amclr_scale.data.indexes.binary import BINARY, MANY, BinaryShards
from amclr_scale.data.indexes.entries import Shard, absolute, read_entries, shard_of
from amclr_scale.data.indexes.shard_lists import Shards
from amclr_scale.data.sources import Given, Source, is_remote, resolve_all, shards_in, unlisted
from amclr_scale.data.storage import Storage, address_key, locked, make_storage
from amclr_scale.distributed import preparing
from amclr_scale.errors import AbsentDataError, UserError

log = logging.getLogger(__name__)


class UnlistedShardsError(UserError):
    """A folder holds shards that its index does not name: they would be left out without a word."""


# What pictures are called; what they are, their bytes say.
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "ppm", "bmp", "jpe", "jfif", "gif", "tif", "tiff", "avif", "jp2", "j2k", "ico", "dib",
    "pgm", "pnm", "heic", "heif",
)  # fmt: skip


def open_index(
    data: schema.Data,
    names: Given | None = None,
    key: str = "data.train",
    *,
    captioned: bool = True,
    share: tuple[int, int] = (0, 1),
    begun: bool = False,
) -> Index:
    """The index of `data.train` (or of `names`), built first where there is none.

    Args:
        captioned: whether samples have to have images and captions.
        share: rank and ranks. Of very many shards each looks at its part of the files; each file is looked at again
            when it is opened.
        begun: these samples were read before, by a run that goes on: shards that lie beside them since are reported.

    Raises:
        UnlistedShardsError: a folder has shards that its index does not name.
        UserError: a name stands for nothing, a shard is missing, has changed, or has no images or captions.
    """
    storage = make_storage(data)
    parts = list[Shards]()
    for source in resolve_all(data.train if names is None else names, key):
        found = _indexed(source, storage, key, share, begun=begun)
        if captioned:
            check_content(found.looked_at(), data.caption if isinstance(data.caption, str) else data.caption[0], key)
        parts.append(found)
    index = Index(parts[0], storage, parts[1:])
    if not index.num_samples:
        raise UserError(f"{key}: expected samples, got {len(index.shards):,} shards without any")
    for part in parts:
        for shard in part.damaged():
            for words in shard.damage:
                log.warning("%s: %s", masked(shard.url), words)
    return index


def share_of(shards: int, share: tuple[int, int]) -> range:
    """Which shards a process of several looks at when it starts: all, unless there are very many."""
    rank, ranks = share if shards > MANY else (0, 1)
    return range(rank * shards // ranks, (rank + 1) * shards // ranks)


def _indexed(source: Source, storage: Storage, key: str, share: tuple[int, int], *, begun: bool) -> Shards:
    if source.index is None:
        return Shards(_build_in_cache(source.name, source.urls, storage, key))
    look = source.folder and share[0] == 0  # one listing, and other ranks cannot see shards that come meanwhile
    if source.index.suffix == BINARY:
        binary = BinaryShards(source.index)
        if look and len(shards_in(source.index.parent)) > len(binary):  # names are only read where they must differ
            _check_listed(source.index, (shard.url for shard in binary), key, begun=begun)
        check_table(binary[int(binary.counts.argmax())])  # before memory is taken for so many samples
        own = share_of(len(binary), share)
        check_files((binary[number] for number in own if not binary.remote[number]), key)
        return binary
    folder = source.index.parent.absolute()
    entries = read_entries(source.index)
    if look:
        _check_listed(source.index, (entry["url"] for entry in entries), key, begun=begun)
    own = share_of(len(entries), share)
    shards = [_from_entry(entry, folder, look=number in own) for number, entry in enumerate(entries)]
    largest = max((shard for shard in shards if shard), key=lambda shard: shard.num_samples, default=None)
    for shard in [*(shards[number] for number in own), largest]:
        if shard:
            check_table(shard)
    check_files((shard for number in own if (shard := shards[number])), key)
    bare = [absolute(entry["url"], folder) for entry, shard in zip(entries, shards, strict=True) if shard is None]
    built = iter(_build_in_cache(source.name, bare, storage, key) if bare else [])
    whole = [shard or next(built) for shard in shards]
    for entry, shard in zip(entries, whole, strict=True):
        if shard.num_samples != entry["nsamples"]:
            raise ChangedShardError(
                f"{key}: {shard.url}: expected {entry['nsamples']:,} samples (from {source.index}), got "
                f"{shard.num_samples:,}{': ' if shard.damage else ''}{'; '.join(shard.damage)}; restore the shard, or "
                "index the shards again"
            )
    return Shards(whole)


def _check_listed(index: Path, urls: Iterable[str], key: str, *, begun: bool) -> None:
    """No shard of a folder is left out because it came after the index was written.

    Raises:
        UnlistedShardsError: one is.
    """
    left = unlisted(index.parent, urls)
    if not left:
        return
    some = f"{left[0]}{f' and {len(left) - 1:,} more' if left[1:] else ''}"
    if begun:
        log.warning("%s: %s does not name %s: this run goes on with what it began with", key, masked(str(index)), some)
        return
    raise UnlistedShardsError(
        f"{key}: {index.parent}: expected every shard of the folder in its {index.name}, got {len(left):,} that "
        f"{'are' if left[1:] else 'is'} not ({some}); run amclr-scale shards index {index.parent}, after which samples "
        f"may have other ids, move what is not meant out of the folder, or name {index} instead of the folder"
    )


def _from_entry(entry: dict[str, Any], folder: Path, *, look: bool) -> Shard | None:
    """None where its member table is not there (whether the file is, is looked at if asked to)."""
    table = entry.get("members")
    if not table or not entry.get("digest") or entry.get("extensions") is None:
        return None
    return shard_of(entry, folder) if not look or os.path.isfile(folder / table) else None


def _build_in_cache(name: str, urls: Sequence[str], storage: Storage, key: str) -> list[Shard]:
    """Index the shards below the cache folder; of several processes one does it, and the others read the tables."""
    missing = [url for url in urls if not is_remote(url) and not os.path.exists(url)]
    if missing:
        raise AbsentDataError(
            f"{key}: {name}: no such shard: {missing[0]} ({len(missing):,} of {len(urls):,} are missing)"
        )
    folder = storage.cache / "indexes"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / hashlib.sha256("\n".join(urls).encode("utf-8", "surrogateescape")).hexdigest()[:32]):
        tables = [folder / f"{address_key(url)}.npz" for url in urls]
        if not all(table.exists() for table in tables):
            log.warning(
                "%s has no index: reading the headers of %s shards once (kept in %s)", name, f"{len(urls):,}", folder
            )
        return build(urls, tables, storage, key=key)


def build(
    urls: Sequence[str], tables: Sequence[Path], storage: Storage, workers: int = 0, *, key: str = "shards"
) -> list[Shard]:
    """Write each shard's member table where none of the same file is there yet, with a progress bar.

    Args:
        tables: where the member table of each url goes.
        workers: processes; 0: this one.
        key: that names the shards, for messages.

    Raises:
        UserError: one of them is no shard.
    """
    jobs = [(url, table, storage) for url, table in zip(urls, tables, strict=True)]
    for table in tables:
        table.parent.mkdir(parents=True, exist_ok=True)
    with _mapper(workers) as run:
        bar = Console(stderr=True, quiet=all(table.exists() for table in tables))
        try:
            return list(track(run(_index_shard, jobs), "Indexing", total=len(jobs), console=bar, transient=True))
        except UserError as error:
            words = str(error)
            if words.startswith(tuple(map(masked, urls))):  # a shard that is none; other mistakes name their own key
                raise type(error)(f"{key}: {words}") from error
            raise


class _mapper:  # noqa: N801 - reads as a function
    def __init__(self, workers: int):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, mp_context=spawn) if workers else None

    def __enter__(self) -> Callable[[Callable[[Any], Shard], Iterable[Any]], Iterator[Shard]]:
        return self.pool.map if self.pool else map

    def __exit__(self, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)


def _index_shard(job: tuple[str, Path, Storage]) -> Shard:
    url, table, storage = job
    source = address_key(url)
    members = _table(table)
    if members is None or members.source != source:
        members = _scan(url, storage)
        members.source = source if not (members.damage and is_remote(url)) else ""  # to be looked at again
        members.save(table)
    preparing.advance("shards indexed")
    return Shard(
        url=url,
        num_samples=len(members),
        members=table,
        digest=members.digest,
        extensions=members.counts(),
        file_size=members.length if is_remote(url) else os.stat(url).st_size,
        sha256=file_sha256(url) if is_packed(url) and not is_remote(url) else None,  # it names the unpacked copy
        damage=tuple(members.damage),
        repeated=int((members.flag == Flag.DUPLICATE_KEY).sum()),
    )


def _scan(url: str, storage: Storage) -> Members:
    """What is in a shard; a copy that is damaged is not kept for the next run, which may find it mended.

    Raises:
        UserError: it is no shard, such as the page that a server shows to those who have to log in.
    """
    path = storage.local_path(url)
    try:
        members = format_of(url).scan(path)
    except UserError as error:
        storage.forget(url)
        if is_remote(url):
            raise UserError(f"{url}: what was fetched is no shard ({error}); it is removed from the cache") from error
        raise
    if members.damage:
        storage.forget(url)
    return members


def _table(path: Path) -> Members | None:
    """A member table from an earlier run; None where there is none, or it was written by another release."""
    try:
        return Members.load(path) if path.exists() else None
    except UserError:
        return None


def file_sha256(path: str) -> str:
    """Of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_content(shards: Sequence[Shard], caption: str, key: str) -> None:
    """Every shard with samples has images and members that captions can come from.

    Raises:
        UserError: one has not.
    """
    member = caption.partition(".")[0]
    for shard in shards:
        if not shard.num_samples:
            continue
        found = sorted(shard.extensions.items())
        held = ", ".join(f"{n:,} .{extension}" for extension, n in found[:8]) or "nothing"
        held += f" and {len(found) - 8:,} other kinds" if len(found) > 8 else ""
        dotted = [one for one in shard.extensions if "." in one and one.rpartition(".")[2] in IMAGE_EXTENSIONS]
        rule = f"; {RULE}" if dotted else ""
        images = sum(shard.extensions.get(extension, 0) for extension in IMAGE_EXTENSIONS)
        if not images:
            raise UserError(
                f"{key}: {shard.url}: expected images (.{', .'.join(IMAGE_EXTENSIONS)}), found {held}{rule}"
            )
        if not shard.extensions.get(member):
            raise UserError(
                f"data.caption: {shard.url}: expected captions in .{member} members, found {held}; set data.caption to "
                f"where they are (txt or json.FIELD){rule}"
            )
        if dotted and images < shard.num_samples:
            log.warning(
                "%s: members such as .%s are no images of their samples: %s", masked(shard.url), dotted[0], RULE
            )
