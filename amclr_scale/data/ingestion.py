"""Read the annotation files of the field as one stream of records: an image file and its captions.

    folder        images with a .txt of the same name beside each; or one folder per class, whose name is the caption
    annotations   JSON list of {"image", "caption": string or list, "image_id"?}: SogCLR, iSogCLR, AmCLR, ALBEF
    coco          captions_*.json: {"images": [...], "annotations": [...]}
    karpathy      dataset_coco.json, dataset_flickr30k.json: {"images": [{"filename", "split", "sentences"}]}
    flickr30k     results.csv (image_name| comment_number| comment), or any CSV with image and caption columns
    table         TSV or CSV of caption and image, with or without a header: CC3M, CC12M with downloaded images

Each record stands for one image file or one pair, in the order of the annotation file.
"""

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.errors import UserError


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    image: str  # path below the image folder
    captions: tuple[str, ...]
    image_id: str | int | None = None  # what the annotation file calls the image
    fields: dict[str, Any] = field(default_factory=dict)  # further content for the sample's JSON


@dataclass(frozen=True)
class Annotations:
    """Where records come from."""

    file: Path | None
    images: Path
    split: str | None = None


def _json(file: Path | None) -> Any:
    if file is None:
        raise UserError("--annotations: expected the annotation file, got none")
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--annotations: {file}: expected JSON, got {error}") from error


def _strings(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(caption for caption in listed if isinstance(caption, str))


def _annotations(source: Annotations) -> Iterator[Record]:
    for number, entry in enumerate(_json(source.file)):
        try:
            yield Record(entry["image"], _strings(entry["caption"]), entry.get("image_id"))
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"--annotations: {source.file}: entry {number}: expected image and caption, got {entry!r}"
            ) from error


def _coco(source: Annotations) -> Iterator[Record]:
    content = _json(source.file)
    try:
        captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
        for annotation in content["annotations"]:
            captions[annotation["image_id"]].append(annotation["caption"])
        for image in content["images"]:
            yield Record(image["file_name"], tuple(captions[image["id"]]), image["id"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--annotations: {source.file}: expected COCO captions (images, annotations), missing {error}"
        ) from error


def _karpathy(source: Annotations) -> Iterator[Record]:
    try:
        for image in _json(source.file)["images"]:
            if source.split is None or image["split"] in source.split.split(","):
                name = f"{image['filepath']}/{image['filename']}" if image.get("filepath") else image["filename"]
                captions = tuple(sentence["raw"] for sentence in image["sentences"])
                yield Record(name, captions, image.get("cocoid", image.get("imgid")), {"split": image["split"]})
    except (KeyError, TypeError) as error:
        raise UserError(f"--annotations: {source.file}: expected a Karpathy split, missing {error}") from error


_IMAGE_COLUMNS = ("image", "image_name", "filename", "filepath", "path", "file", "url")
_CAPTION_COLUMNS = ("caption", "comment", "raw", "title", "text")


def _rows(file: Path | None) -> tuple[list[str] | None, list[list[str]]]:
    """The header, where there is one, and the rows of a file separated by tabs, bars or commas."""
    if file is None:
        raise UserError("--annotations: expected the annotation file, got none")
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            first = lines.readline()
            separator = next((mark for mark in "\t|," if mark in first), ",")
            lines.seek(0)
            if separator == ",":
                table = csv.reader(lines)
            else:
                table = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE)
            rows = [[cell.strip() for cell in row] for row in table if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--annotations: {file}: expected a table, got {error}") from error
    header = [cell.lower() for cell in rows[0]] if rows else []
    known = {*_IMAGE_COLUMNS, *_CAPTION_COLUMNS}
    return (header, rows[1:]) if len(known & set(header)) >= 2 else (None, rows)


def _column(header: list[str], known: tuple[str, ...], file: Path | None) -> int:
    for name in known:
        if name in header:
            return header.index(name)
    raise UserError(f"--annotations: {file}: expected a column {', '.join(known)}, got {', '.join(header)}")


def _flickr30k(source: Annotations) -> Iterator[Record]:
    """All captions of an image as one record, whether they stand in as many rows or in one JSON list."""
    header, rows = _rows(source.file)
    if header is None:
        raise UserError(f"--annotations: {source.file}: expected a header such as image_name| comment_number| comment")
    image, caption = _column(header, _IMAGE_COLUMNS, source.file), _column(header, _CAPTION_COLUMNS, source.file)
    split = header.index("split") if "split" in header else None
    captions: dict[str, list[str]] = {}
    for row in rows:
        if len(row) <= max(image, caption):  # the published file has one such row
            continue
        if source.split and split is not None and row[split] not in source.split.split(","):
            continue
        found = json.loads(row[caption]) if row[caption].startswith("[") else [row[caption]]
        captions.setdefault(row[image], []).extend(found)
    yield from (Record(name, tuple(found)) for name, found in captions.items())


def _table(source: Annotations) -> Iterator[Record]:
    """A caption and an image per row; an image may be a path, or a url whose file was downloaded.

    A downloaded file is found by the row's number (12.jpg or 00000012.jpg) or by the last part of the url.
    """
    header, rows = _rows(source.file)
    caption, image = (0, 1) if header is None else (
        _column(header, _CAPTION_COLUMNS, source.file),
        _column(header, _IMAGE_COLUMNS, source.file),
    )  # fmt: skip
    downloaded: dict[str, str] | None = None
    for number, row in enumerate(rows):
        if len(row) <= max(caption, image):
            continue
        name = row[image]
        if "://" in name:
            if downloaded is None:
                files = [path for path in source.images.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
                downloaded = {path.stem.lstrip("0") or "0": str(path.relative_to(source.images)) for path in files}
                downloaded |= {path.name: str(path.relative_to(source.images)) for path in files}
            last = name.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1]
            name = downloaded.get(str(number)) or downloaded.get(last) or name
        yield Record(name, (row[caption],), fields={"url": row[image]} if "://" in row[image] else {})


def _folder(source: Annotations) -> Iterator[Record]:
    files = [path for path in source.images.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    for path in sorted(files):
        text = path.with_suffix(".txt")
        name = str(path.relative_to(source.images))
        if text.is_file():
            lines = [line.strip() for line in text.read_text("utf-8", "replace").splitlines()]
            yield Record(name, tuple(line for line in lines if line))
        elif path.parent != source.images:
            label = path.parent.name
            yield Record(name, (label.replace("_", " "),), fields={"class": label})
        else:
            yield Record(name, ())


FORMATS: dict[str, Callable[[Annotations], Iterator[Record]]] = {
    "folder": _folder,
    "annotations": _annotations,
    "coco": _coco,
    "karpathy": _karpathy,
    "flickr30k": _flickr30k,
    "table": _table,
}


def read_records(kind: str, source: Annotations) -> list[Record]:
    """All records of an annotation file.

    Raises:
        UserError: the image folder or the file is missing, or the file is not of that format.
    """
    if not source.images.is_dir():
        raise UserError(f"--images: expected the folder of the images, got {source.images}, which is none")
    records = list(FORMATS[kind](source))
    if not records:
        chosen = f" of split {source.split}" if source.split else ""
        raise UserError(f"--annotations: {source.file or source.images}: expected records{chosen}, found none")
    return records


def pairs(records: list[Record]) -> list[Record]:
    """One record per caption, instead of one per image."""
    return [Record(r.image, (caption,), r.image_id, r.fields) for r in records for caption in r.captions]
