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
from collections import Counter
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
        return json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"--annotations: {file}: expected JSON, got {error}") from error


def _strings(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(caption for caption in listed if isinstance(caption, str))


def _annotations(source: Annotations) -> Iterator[Record]:
    content = _json(source.file)
    if not isinstance(content, list):
        raise UserError(f"--annotations: {source.file}: expected a list of {{image, caption}}, got another JSON value")
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str) or "caption" not in entry:
            raise UserError(f"--annotations: {source.file}: entry {number}: expected image and caption, got {entry!r}")
        yield Record(entry["image"], _strings(entry["caption"]), entry.get("image_id"))


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
        with file.open(encoding="utf-8-sig", newline="") as lines:  # spreadsheets write a byte order mark in front
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
        captions.setdefault(row[image], []).extend(_listed(row[caption]))
    yield from (Record(name, tuple(found)) for name, found in captions.items())


def _listed(cell: str) -> list[str]:
    """The captions of a JSON list; or the one that a cell holds, which may begin with a bracket too."""
    try:
        found = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        found = None
    return [str(caption) for caption in found] if isinstance(found, list) else [cell]


def _table(source: Annotations) -> Iterator[Record]:
    """A caption and an image per row; an image may be a path, or a url whose file was downloaded."""
    header, rows = _rows(source.file)
    caption, image = (0, 1) if header is None else (
        _column(header, _CAPTION_COLUMNS, source.file),
        _column(header, _IMAGE_COLUMNS, source.file),
    )  # fmt: skip
    whole = {number: row for number, row in enumerate(rows) if len(row) > max(caption, image)}
    downloaded = _downloaded(source.images, {n: row[image] for n, row in whole.items() if "://" in row[image]})
    for number, row in whole.items():
        url = {"url": row[image]} if "://" in row[image] else {}
        yield Record(downloaded.get(number, row[image]), (row[caption],), fields=url)


def _downloaded(images: Path, urls: dict[int, str]) -> dict[int, str]:
    """Files by the number of the row whose url they came from.

    Downloaders name files after rows (12.jpg, 00000012.jpg) or after the last parts of urls: what explains more of
    the files holds for all of them, since for a row whose own file is missing the other way would find another row's
    picture. A last part that several urls share says nothing.
    """
    if not urls:
        return {}
    files = [path for path in images.rglob("*") if path.suffix[1:].lower() in IMAGE_EXTENSIONS]
    by_number = {path.stem.lstrip("0") or "0": str(path.relative_to(images)) for path in files}
    by_name = {path.name: str(path.relative_to(images)) for path in files}
    last = {url: url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1] for url in urls.values()}
    shared = Counter(last.values())
    if len(by_name.keys() & shared.keys()) > len(by_number.keys() & {str(n) for n in urls}):
        return {n: by_name[last[url]] for n, url in urls.items() if last[url] in by_name and shared[last[url]] == 1}
    return {n: by_number[str(n)] for n in urls if str(n) in by_number}


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
