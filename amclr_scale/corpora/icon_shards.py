"""Write the pictures of a split as gzipped WebDataset shards: a picture, a .txt and a .json each.

Tar spends more bytes on headers than a small picture has; gzip takes them away again. webdataset reads such shards as
they are, and this package unpacks them once into its cache.
"""

import gzip
import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from amclr_scale.corpora.icon_names import Meaning, captions
from amclr_scale.corpora.icon_splits import Picture


@dataclass(frozen=True)
class About:
    """What all pictures of a set share."""

    title: str
    kind: str
    licence: str


@dataclass(frozen=True)
class ShardJob:
    """One shard.

    Attributes:
        out: the folder of its split.
        drawn: folder that has PREFIX.pictures.
        pictures: what goes into it, in order, each with what its name says.
        sets: about the sets, by prefix.
    """

    out: Path
    number: int
    drawn: Path
    form: str
    pictures: list[tuple[Picture, Meaning]]
    sets: dict[str, About]

    @property
    def path(self) -> Path:
        """The shard."""
        return self.out / f"{self.number:05d}.tar.gz"


def content_of(picture: Picture, meaning: Meaning, about: About) -> dict[str, Any]:
    """The sample's JSON."""
    listed = captions(meaning, picture.category, about.title)
    return {
        "caption": listed[0],
        "captions": listed,
        "name": picture.name,
        "words": meaning.words,
        "concept": meaning.concept,
        "style": meaning.style,
        "category": picture.category,
        "set": picture.prefix,
        "kind": about.kind,
        "license": about.licence,
        "picture": picture.digest,
    }


def write_shard(job: ShardJob) -> int:
    """Write one shard, unless it is there; how many samples it has."""
    if job.path.is_file():
        return len(job.pictures)
    job.out.mkdir(parents=True, exist_ok=True)
    plain = io.BytesIO()
    files: dict[str, int] = {}
    try:
        with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for row, (picture, meaning) in enumerate(job.pictures):
                if picture.prefix not in files:
                    files[picture.prefix] = os.open(job.drawn / f"{picture.prefix}.pictures", os.O_RDONLY)
                data = os.pread(files[picture.prefix], picture.length, picture.offset)
                key = f"{job.number:05d}{row:05d}"
                content = {"key": key, **content_of(picture, meaning, job.sets[picture.prefix])}
                text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
                for extension, member in (
                    (job.form, data),
                    ("txt", content["caption"].encode()),
                    ("json", text.encode()),
                ):
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size = len(member)
                    tar.addfile(info, io.BytesIO(member))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    partial = job.path.with_name(f".{job.path.name}.{os.getpid()}")
    partial.write_bytes(gzip.compress(plain.getvalue(), 6, mtime=0))
    partial.replace(job.path)
    return len(job.pictures)
