"""What `data.train` and `evaluation.splits` may name: a split of the embedded corpus, an index, a folder, shards."""

import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from braceexpand import braceexpand

from amclr_scale.addresses import refusal
from amclr_scale.data.formats.shards import SHARD_FORMATS, shard_suffixes
from amclr_scale.errors import AbsentDataError, UserError, one_of

CORPORA = Path(__file__).parent / "corpora"
INDEX_NAMES = ("index.json", "index.bin")  # in a folder of shards: the form that others read, and that of very many
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".jsonl")
_LOOKED_AT = 1000  # files of a folder, for words about what it holds
_INDEXES = tuple(Path(name).suffix for name in INDEX_NAMES)


@dataclass(frozen=True)
class Source:
    """One name, resolved: an index file, or shards that may have none."""

    name: str
    index: Path | None
    urls: tuple[str, ...] = ()
    folder: bool = False  # whether the index was found in a folder that was named, and not named itself


def is_remote(url: str) -> bool:
    """Whether a url is not a path on a file system."""
    return "://" in url or url.startswith("pipe:")


def names_protocol(url: str) -> bool:
    """Whether an address begins as those do that say how they are read: `s3://`, `simplecache::s3://`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.:-]*://", url) is not None


def embedded_splits() -> list[str]:
    """The names of the splits that ship with the package."""
    return sorted(str(path.parent.relative_to(CORPORA)) for path in CORPORA.glob("*/*/index.json"))


def shards_in(folder: Path) -> list[str]:
    """The shards of a folder, by name; whatever else lies there (parquet, statistics) is not looked at."""

    def numbers(name: str) -> list[str | int]:  # 2.tar before 10.tar
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]

    found = [path for path in folder.iterdir() if path.name.endswith(shard_suffixes())]
    return [str(path) for path in sorted(found, key=lambda path: numbers(path.name))]


def unlisted(folder: Path, urls: Iterable[str]) -> list[str]:
    """The names of a folder's shards that none of an index's addresses stands for.

    An address elsewhere stands for any shard of its name: an index of a store may lie beside copies of its shards, and
    one with absolute paths may have been moved along with them. Hidden files are what file systems leave (`._0.tar`).
    """
    home = os.path.join(os.path.abspath(folder), "")
    known = set[str]()
    for url in urls:
        path = url.partition("?")[0] if is_remote(url) else os.path.normpath(os.path.join(home, url))
        known.add(path.removeprefix(home) if path.startswith(home) else path.rpartition("/")[2])
    return [name for name in map(os.path.basename, shards_in(folder)) if name not in known and name[0] != "."]


def read_from(path: str) -> str:
    """Where a relative path was looked for, for messages: whoever starts a command elsewhere sees why it finds none."""
    return "" if Path(path).expanduser().is_absolute() else f"; relative paths are read from {Path.cwd()}"


def resolve(name: str, key: str) -> Source:
    """Say what one name stands for; `key` is the configuration key it came from, for messages.

    Raises:
        UserError: it stands for nothing.
    """
    if words := refusal(key, name):
        raise UserError(words)
    if name in embedded_splits():
        return Source(name, CORPORA / name / "index.json")
    if not is_remote(name):
        path = Path(name).expanduser()
        if path.is_dir():
            return _folder(name, path, key)
        if path.suffix in _INDEXES:
            if not path.is_file():
                raise AbsentDataError(f"{key}: no such index: {name}{read_from(name)}")
            return Source(name, path)
    try:
        urls = tuple(str(url) for url in braceexpand(name))
    except ValueError as error:  # the package's UnbalancedBracesError is one, but not in its type stubs
        raise UserError(
            f"{key}: {name}: braces do not match; expected a pattern such as {{00000..00099}}.tar"
        ) from error
    if wrong := [url for url in urls if "://" in url and not url.startswith("pipe:") and not names_protocol(url)]:
        raise UserError(
            f"{key}: expected addresses with their protocol, such as s3://BUCKET/00000.tar, got {wrong[0]}, which "
            "names none"
        )
    if is_remote(name) and name.endswith(_INDEXES):
        raise UserError(f"{key}: expected an index on a file system, got {name}; download it, or name the shards")
    if is_remote(name):
        return Source(name, None, urls)
    if not all(url.endswith(shard_suffixes()) for url in urls):
        kind = UserError if os.path.exists(os.path.expanduser(name)) else AbsentDataError
        raise kind(
            f"{key}: expected a split of the embedded corpus ({', '.join(embedded_splits())}), an index (.json, .bin), "
            f"a folder of shards, or paths of {one_of(shard_suffixes())} shards, got {name!r}, which is none of "
            f"them{how_to_make(name) or read_from(name)}"
        )
    missing = [url for url in urls if not Path(url).expanduser().is_file()]
    if missing:
        how_many = f"{len(missing):,} of {len(urls):,} are missing"
        raise AbsentDataError(f"{key}: no such shard: {missing[0]} ({how_many}){read_from(missing[0])}")
    return Source(name, None, tuple(str(Path(url).expanduser()) for url in urls))


def how_to_make(name: str) -> str:
    """The command that makes shards of what a user holds: a table, or a folder of pictures; "" of anything else."""
    from amclr_scale.data.indexing import IMAGE_EXTENSIONS  # which needs this module

    path, make = Path(name).expanduser(), "; make shards of it first: amclr-scale shards make"
    shown = shlex.quote(str(path))
    if path.is_file() and path.suffix.lower() in _TABLES:
        return f"{make} table --annotations {shown} --images FOLDER --out SHARDS"
    if path.is_dir() and any(one.suffix[1:].lower() in IMAGE_EXTENSIONS for one in islice(path.rglob("*"), _LOOKED_AT)):
        return f"{make} folder --images {shown} --out SHARDS"
    return ""


def _folder(name: str, folder: Path, key: str) -> Source:
    indexes = [folder / one for one in INDEX_NAMES if (folder / one).is_file()]
    if len(indexes) > 1:
        raise UserError(f"{key}: {name}: expected one index, found {' and '.join(INDEX_NAMES)}; remove or name one")
    if indexes:
        return Source(name, indexes[0], folder=True)
    urls = shards_in(folder)
    if not urls and (folder / "test").is_dir():  # CLIP_benchmark's layout: test/0.tar, test/1.tar, ...
        return _folder(name, folder / "test", key)
    if not urls:
        shards = one_of(SHARD_FORMATS)
        kind = UserError if any(folder.iterdir()) else AbsentDataError  # a disk that is not mounted
        raise kind(
            f"{key}: {name}: expected a folder with an index.json or with {shards} shards, found neither in it"
            f"{how_to_make(name)}"
        )
    return Source(name, None, tuple(urls))


Given = str | Sequence[str] | Mapping[str, str | None]  # one, several, or several with names


def paths_of(given: Given, key: str) -> list[str]:
    """Where data sets lie that are given by path or by name.

    Raises:
        UserError: of some only the names are known, as in the configuration of an exported model.
    """
    if isinstance(given, str):
        return [given]
    if not isinstance(given, Mapping):
        return list(given)
    unknown = [name for name, path in given.items() if path is None]
    if unknown:
        lie = " and ".join(unknown) + (" lie" if unknown[1:] else " lies")
        example = ", ".join(f"{name}: {path or 'PATH'}" for name, path in given.items())
        raise UserError(
            f"{key}: expected where {lie} on this machine, got null (an exported model keeps names, not paths); set "
            f"{key}={{{example}}}"
        )
    return [path for path in given.values() if path is not None]


def resolve_all(names: Given, key: str) -> list[Source]:
    """`resolve`, for one, several, or several with names."""
    listed = paths_of(names, key)
    if not listed:
        raise UserError(f"{key}: expected at least one name of shards, got an empty list")
    return [resolve(name, key) for name in listed]
