"""The entries of an index, a dictionary for each shard: checked, read and written.

On disk they are the `shardlist` JSON of the webdataset family, with more keys per shard than they read:

    url  nsamples                  as they have it; a url is relative to the index's folder
    filesize  sha256               of the file at the url; sha256 only where it was computed (compressed shards)
    digest                         of all that lies in it; a tar's: sha256 of its headers
    extensions                     how many members of each kind
    members                        the member table (data/formats/members.py), relative too
    damage                         what was wrong with the shard when it was indexed, in words; absent when nothing was
"""

import json
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr_scale.data.formats.shards import format_of, is_packed
from amclr_scale.data.formats.tar import BLOCK, TAR
from amclr_scale.data.sources import is_remote
from amclr_scale.errors import UserError

_MOST = 1 << 56  # of anything that is counted
_LONGEST = 4096  # characters of an address or a path


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
    repeated: int = field(default=0, compare=False)  # samples with a key that it had before; known where it is indexed

    @property
    def kind(self) -> tuple[tuple[str, bool], ...]:
        """Which members it has, and which of them every sample may have."""
        found = sorted(self.extensions.items())
        return tuple((name, count >= self.num_samples) for name, count in found if count)


class _AnnotationsError(UserError):
    """What was given as an index holds annotations."""


def read_entries(path: Path) -> list[dict[str, Any]]:
    """The shard list of an index file, checked for shape.

    Raises:
        UserError: it is not an index.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
        if kind := _annotations_in(content):
            raise _AnnotationsError(
                f"{path}: expected an index (JSON with a `shardlist`), got what looks like annotations; make shards of "
                f"them first: amclr-scale shards make {kind} --annotations {shlex.quote(str(path))} --images FOLDER "
                "--out SHARDS"
            )
        entries = content["shardlist"]
        for entry in entries:
            check_entry(entry)
    except _AnnotationsError:  # in words already, and a ValueError
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: expected an index (JSON with a `shardlist` of `url` and `nsamples`), got {error!r}; "
            "amclr-scale shards index writes one"
        ) from error
    if not entries:
        raise UserError(f"{path}: expected at least one shard in `shardlist`, got none")
    return list(entries)


def _annotations_in(content: Any) -> str:
    """What `shards make` calls annotations that somebody takes for an index; "" of anything else."""
    if isinstance(content, list):
        return "annotations"
    if not isinstance(content, dict) or "images" not in content or "shardlist" in content:
        return ""
    return "coco" if "annotations" in content else "karpathy"


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


def absolute(url: str, folder: Path) -> str:
    """A url of an index in `folder`."""
    return url if is_remote(url) or os.path.isabs(url) else str(folder / url)


def shard_of(entry: dict[str, Any], folder: Path) -> Shard:
    """What an entry of an index in `folder` says, which is checked."""
    return Shard(
        url=absolute(entry["url"], folder),
        num_samples=entry["nsamples"],
        members=folder / entry["members"],
        digest=entry["digest"],
        extensions=dict(entry["extensions"]),
        file_size=entry.get("filesize"),
        sha256=entry.get("sha256"),
        damage=tuple(entry.get("damage") or ()),
    )


def entries_of(shards: Sequence[Shard], folder: Path) -> list[dict[str, Any]]:
    """Entries of an index in `folder`; urls and tables below it become relative."""
    home = f"{folder}{os.sep}"

    def relative(place: str) -> str:
        return place if is_remote(place) else place.removeprefix(home)

    entries: list[dict[str, Any]] = []
    for shard in shards:
        entry: dict[str, Any] = {"url": relative(shard.url), "nsamples": shard.num_samples}
        entry |= {"filesize": shard.file_size} if shard.file_size is not None else {}
        entry |= {"sha256": shard.sha256} if shard.sha256 else {}
        entry |= {"digest": shard.digest, "extensions": shard.extensions, "members": relative(str(shard.members))}
        entry |= {"damage": list(shard.damage)} if shard.damage else {}
        entries.append(entry)
    return entries


def write_index(path: Path, name: str, shards: Sequence[Shard]) -> None:
    """Write the JSON, whole or not at all."""
    content = {"wids_version": 1, "name": name, "shardlist": entries_of(shards, path.parent)}
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(content, indent=1) + "\n", "utf-8")
    partial.replace(path)
