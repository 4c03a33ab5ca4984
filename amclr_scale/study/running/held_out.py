"""What a cell is measured on, as far as paths name it, and a fingerprint of what lies there now.

Of shards it is that of their index. Of everything else it is of the content of every file, and of pictures of the size:
a study that goes on should not have to read them all first. Imports no torch.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path

from amclr_scale.config.schema import Config, Data
from amclr_scale.data.formats.annotation_files import entries, kind_of, read_json
from amclr_scale.data.formats.picture_files import is_hidden, is_picture
from amclr_scale.data.formats.shards import shard_suffixes
from amclr_scale.data.indexing import open_index
from amclr_scale.data.names import known_as
from amclr_scale.data.sources import INDEX_NAMES, shards_in

SPLITS = "evaluation.splits"
_INDEXES = tuple(Path(name).suffix for name in INDEX_NAMES)


def measured_on(config: Config) -> Iterator[tuple[str, str]]:
    """(path, key of the configuration that names it), each path once. Suites are not among them."""
    evaluation = config.evaluation
    probes = [given for one in evaluation.probes for given in (one.test, one.train)]
    named = [(SPLITS, evaluation.splits), *(("evaluation.probes", given) for given in probes)]
    found = {path: key for key, given in reversed(named) for path in known_as(given).values() if path is not None}
    yield from found.items()
    for key, file in (("class_names", evaluation.class_names), ("templates", evaluation.templates)):
        if isinstance(file, str) and Path(file).expanduser().is_file():
            yield file, f"evaluation.{key}"


def content_of(given: str, key: str, config: Config) -> str:
    """32 hex digits.

    Raises:
        UserError: nothing is there, or shards have changed since they were indexed.
    """
    place, _, part = given.partition("#")
    path = Path(place).expanduser()
    if path.is_file() and key not in (SPLITS, "evaluation.probes"):
        return _hashed([_digest(path)])
    if path.suffix in (".json", ".jsonl") and path.is_file() and not _is_index(path):
        root = config.evaluation.image_root
        return _hashed(_annotated(path, key, Path(root).expanduser() if root else path.parent, part or "test"))
    if path.is_file() and not path.name.endswith((*shard_suffixes(), *_INDEXES)):  # of a format that was added
        return _hashed([_digest(path)])
    if (path / "test").is_dir() and shards_in(path / "test"):  # first, as in evaluation/splits.py
        return _hashed(_benchmark(path, config.data, key))
    if path.is_dir() and not (any((path / name).is_file() for name in INDEX_NAMES) or shards_in(path)):
        return _hashed(_below(path))
    return open_index(config.data, given, key, captioned=False).fingerprint


def _annotated(file: Path, key: str, root: Path, split: str) -> Iterator[bytes]:
    yield _digest(file)
    content = read_json(file, key)
    for entry in entries(content, kind_of(content, f"{key}: {file}"), f"{key}: {file}"):
        if entry.image is not None and entry.split in (None, split):
            yield _size(root / entry.image)


def _benchmark(folder: Path, data: Data, key: str) -> Iterator[bytes]:
    """Of CLIP_benchmark's shards and the texts beside them; what else is there, such as train, is not read."""
    yield open_index(data, str(folder / "test"), key, captioned=False).fingerprint.encode()
    for path in sorted(folder.glob("*.txt")):
        yield path.name.encode("utf-8", "surrogateescape")
        yield _content(path)


def _below(folder: Path) -> Iterator[bytes]:
    """Of pictures in folders and the texts beside them, or of CIFAR's files."""
    for path in sorted(one for one in folder.iterdir() if not is_hidden(one)):
        yield path.name.encode("utf-8", "surrogateescape")
        if path.is_dir():
            yield from _below(path)
        else:
            yield _size(path) if is_picture(path) else _content(path)


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"shardlist"' in file.read(4096)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _content(path: Path) -> bytes:
    """Of a link that leads nowhere, as of a picture, that there is none: no evaluation reads it."""
    return _digest(path) if path.is_file() else b"None"


def _size(picture: Path) -> bytes:
    return str(picture.stat().st_size if picture.is_file() else None).encode()


def _hashed(parts: Iterator[bytes] | list[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:32]
