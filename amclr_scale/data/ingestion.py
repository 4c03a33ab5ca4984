"""Read the annotation files of the field as one stream of records: an image file and its captions.

    folder        images with a .txt of the same name beside each; or one folder per class, whose name is the caption
    annotations   JSON list of {"image", "caption": string or list, "image_id"?}: SogCLR, iSogCLR, AmCLR, ALBEF
    coco          captions_*.json: {"images": [...], "annotations": [...]}
    karpathy      dataset_coco.json, dataset_flickr30k.json: {"images": [{"filename", "split", "sentences"}]}
    flickr30k     results.csv (image_name| comment_number| comment), or any table with image and caption columns: rows
                  of one image become one record
    table         an image and its captions per row: .csv, .tsv, .txt, .jsonl, .parquet, .arrow, or a folder that the
                  library `datasets` of Hugging Face has saved; pictures are paths, urls whose files were downloaded
                  (CC3M, CC12M), or inside the parquet or arrow file

Each record stands for one image file or one pair, in the order of the annotation file. What cannot become a record is a
reject with its reason: everything that was read is either of the two.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from amclr_scale.data.formats.annotation_files import Entry, Kind, entries, path_of, read_json, strings
from amclr_scale.data.formats.picture_files import Classes, find_pictures
from amclr_scale.data.formats.tables import (
    HeaderWords,
    Quoting,
    Row,
    Table,
    column_name,
    looks_like_picture,
    read_table,
)
from amclr_scale.data.formats.typed_tables import StoredPicture, is_typed, read_typed_table
from amclr_scale.errors import UserError

_WHERE = "--annotations"


@dataclass(frozen=True)
class Record:
    """One image and what is said about it."""

    row: int  # in the file, from 0
    image: str  # path below the image folder, or what a stored picture is called
    captions: tuple[str, ...]
    image_id: str | int | None = None  # what the annotation file calls the image
    fields: dict[str, Any] = field(default_factory=dict)  # further content for the sample's JSON
    stored: StoredPicture | None = None  # where the picture is, if not in a file of its own


@dataclass(frozen=True)
class Reject:
    """What was read and is no record."""

    row: int  # in the file, from 0
    kind: str
    detail: str = ""
    image: str = ""
    of_caption: bool = False  # one caption of a record that has others


@dataclass
class Records:
    """All that an annotation file holds."""

    records: list[Record] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    decided: str = ""  # how the file was read, in words

    def add(self, found: Iterable[Record | Reject]) -> None:
        for one in found:
            if isinstance(one, Record):
                self.records.append(one)
            else:
                self.rejects.append(one)

    def told(self) -> str:
        """How the file was read, how many were, and how many of these cannot be written."""
        no_record = sum(not one.of_caption for one in self.rejects)
        less = f", of which {no_record:,} cannot be used" if no_record else ""
        return f"{self.decided}; read {len(self.records) + no_record:,}{less}"


@dataclass(frozen=True)
class Annotations:
    """Where records come from, and what the user says about a table beside its name."""

    file: Path | None
    images: Path
    split: str | None = None
    separator: str | None = None
    quoting: Quoting | None = None
    image_column: str | None = None
    caption_column: str | None = None

    def wants(self, split: str | None) -> bool:
        """Whether records of this split were asked for."""
        return self.split is None or split in self.split.split(",")


def _given(source: Annotations) -> Path:
    if source.file is None:
        raise UserError(f"{_WHERE}: expected the annotation file, got none")
    return source.file


def _record(entry: Entry, fields: dict[str, Any], stored: StoredPicture | None = None) -> Iterator[Record | Reject]:
    """An entry as a record, and its captions that are none; or as a reject."""
    if entry.image is None:
        yield Reject(entry.number, "no image path", entry.words or "; ".join(entry.left_out))
    elif not entry.captions:
        yield Reject(entry.number, "no caption", "; ".join(entry.left_out), entry.image)
    else:
        yield Record(entry.number, entry.image, entry.captions, entry.image_id, fields, stored)
        yield from (Reject(entry.number, words, image=entry.image, of_caption=True) for words in entry.left_out)


def _from_json(kind: Kind, source: Annotations, into: Records) -> None:
    file = _given(source)
    into.decided = f"{file.name}: JSON"
    for entry in entries(read_json(file, _WHERE), kind, f"{_WHERE}: {file}"):
        if entry.split is None or source.wants(entry.split):
            into.add(_record(entry, {} if entry.split is None else {"split": entry.split}))


_IMAGE_COLUMNS = (
    "image", "image_name", "filename", "filepath", "file_path", "image_path", "image_file", "path", "file", "file_name",
    "img", "picture", "photo", "jpg", "url", "image_url",
)  # fmt: skip
_CAPTION_COLUMNS = (
    "caption", "comment", "raw", "title", "text", "captions", "sentence", "sentences", "description", "alt_text", "alt",
)  # fmt: skip
_KNOWN = frozenset((*_IMAGE_COLUMNS, *_CAPTION_COLUMNS, "split", "comment_number"))


def _read_table(source: Annotations, into: Records) -> Table:
    file = _given(source)
    if is_typed(file):
        table = read_typed_table(file, source.split)
    else:
        named = [name for name in (source.image_column, source.caption_column) if name and not name.isdecimal()]
        words = HeaderWords(_KNOWN, frozenset(map(column_name, named)))
        table = read_table(file, words, source.separator, source.quoting)
    into.decided = f"{file.name}: {table.dialect}"
    into.add(Reject(row.number, row.kind, f"line {row.line}: {row.detail}") for row in table.rejected)
    return table


def _column(columns: list[str], wanted: str | None, known: tuple[str, ...], option: str, file: Path) -> int:
    """Where a column is: the one that was asked for, or the first that is known."""
    exact, loose = [name.lower().strip() for name in columns], [column_name(name) for name in columns]
    for name in [wanted.lower().strip()] if wanted else known:
        for names in (exact, loose):
            if name in names:
                return names.index(name)
    if wanted and wanted.isdecimal() and int(wanted) < len(columns):
        return int(wanted)
    asked = wanted or f"a column {', '.join(known)}"
    raise UserError(f"{option}: {file}: expected {asked}, got the columns {', '.join(columns)}; {option} names it")


def _columns(table: Table, source: Annotations, otherwise: tuple[int, int]) -> tuple[int, int]:
    """(image, caption): which columns they are; of a table without header, `otherwise` or the numbers given."""
    file = _given(source)
    cells = table.rows[0].cells if table.rows else ()
    stored = tuple(i for i, cell in enumerate(cells) if isinstance(cell, StoredPicture))
    if table.columns is not None:
        names = table.columns
        of_pictures = tuple(column_name(names[i]) for i in stored)
        found = (
            _column(names, source.image_column, of_pictures + _IMAGE_COLUMNS, "--image-column", file),
            _column(names, source.caption_column, _CAPTION_COLUMNS, "--caption-column", file),
        )
    else:
        names = [str(number) for number in range(max(2, len(cells)))]
        found = (
            _column(names, source.image_column or str(otherwise[0]), (), "--image-column", file),
            _column(names, source.caption_column or str(otherwise[1]), (), "--caption-column", file),
        )
    table.dialect += f"; images in column {names[found[0]]}, captions in {names[found[1]]}"
    return found


def _entry(row: Row, image: int, caption: int) -> tuple[Entry, StoredPicture | None]:
    captions, left_out = strings(_texts(row.cells[caption]))
    cell = row.cells[image]
    if isinstance(cell, StoredPicture):
        return Entry(row.number, str(cell), captions, left_out), cell
    return Entry(row.number, path_of(cell), captions, left_out), None


def _texts(cell: Any) -> Any:
    """What stands in a cell for captions: a text, a list of them, or of {raw}; or such a list written as JSON."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            found = json.loads(cell)
        except ValueError:  # not every bracket begins a list
            return cell
        cell = found if isinstance(found, list) else cell
    if isinstance(cell, list):
        return [one.get("raw", one) if isinstance(one, dict) else one for one in cell]
    return cell


def _flickr30k(source: Annotations, into: Records) -> None:
    """All captions of an image as one record, whether they stand in as many rows or in one JSON list."""
    table = _read_table(source, into)
    if table.columns is None:
        raise UserError(f"{_WHERE}: {source.file}: expected a header such as image_name| comment_number| comment")
    image, caption = _columns(table, source, (0, 1))
    into.decided = f"{_given(source).name}: {table.dialect}"
    split = next((i for i, name in enumerate(table.columns) if column_name(name) == "split"), None)
    images: dict[str, Record] = {}
    for row in table.rows:
        if split is not None and not source.wants(row.cells[split]):
            continue
        entry, stored = _entry(row, image, caption)
        for one in _record(entry, {}, stored):
            if isinstance(one, Record):
                before = images.get(one.image)
                images[one.image] = replace(before, captions=before.captions + one.captions) if before else one
            else:
                into.add([one])
    into.add(images.values())


def _table(source: Annotations, into: Records) -> None:
    """An image and its captions per row; an image may be a path, a url whose file was downloaded, or stored inside."""
    table = _read_table(source, into)
    looks_like_path = table.columns is None and bool(table.rows) and _path_first(table.rows)
    image, caption = _columns(table, source, (0, 1) if looks_like_path else (1, 0))
    into.decided = f"{_given(source).name}: {table.dialect}"
    found = [_entry(row, image, caption) for row in table.rows]
    urls = {entry.number: entry.image for entry, _ in found if entry.image and "://" in entry.image}
    downloaded = _downloaded(source.images, urls)
    for entry, stored in found:
        if entry.number in urls:
            there = replace(entry, image=downloaded.get(entry.number, entry.image))
            into.add(_record(there, {"url": entry.image}, stored))
        else:
            into.add(_record(entry, {}, stored))


def _path_first(rows: list[Row]) -> bool:
    """Whether the first column of a table without header holds the images: more of its cells look like pictures'."""
    paths = [sum(looks_like_picture(str(row.cells[i])) for row in rows[:100]) for i in (0, 1)]
    return paths[0] > paths[1]


def _downloaded(images: Path, urls: dict[int, str]) -> dict[int, str]:
    """Files by the number of the row whose url they came from.

    Downloaders name files after rows (12.jpg, 00000012.jpg) or after the last parts of urls: what explains more of
    the files holds for all of them, since for a row whose own file is missing the other way would find another row's
    picture. A last part that several urls share says nothing.
    """
    if not urls:
        return {}
    files = find_pictures(images).pictures
    by_number = {path.stem.lstrip("0") or "0": str(path.relative_to(images)) for path in files}
    by_name = {path.name: str(path.relative_to(images)) for path in files}
    last = {url: url.split("?", 1)[0].rstrip("/").rsplit("/", 1)[-1] for url in urls.values()}
    shared = Counter(last.values())
    if len(by_name.keys() & shared.keys()) > len(by_number.keys() & {str(n) for n in urls}):
        return {n: by_name[last[url]] for n, url in urls.items() if last[url] in by_name and shared[last[url]] == 1}
    return {n: by_number[str(n)] for n in urls if str(n) in by_number}


def _folder(source: Annotations, into: Records) -> None:
    found = find_pictures(source.images)
    into.decided = "; ".join(filter(None, ("a folder of pictures", found.told())))
    classes = Classes(source.images, found.pictures)
    if not found.pictures:
        raise UserError(
            f"--images: {source.images}: expected pictures, found none{found.told() and '; ' + found.told()}"
        )
    for number, path in enumerate(found.pictures):
        captions, folder, fields = found.captions(path), classes.folder(path), dict[str, Any]()
        if folder and not found.has_text(path):
            captions, fields = [folder.name.replace("_", " ")], {"class": folder.name}
        into.add(_record(Entry(number, str(path.relative_to(source.images)), tuple(captions)), fields))


FORMATS: dict[str, Callable[[Annotations, Records], None]] = {
    "folder": _folder,
    "annotations": partial(_from_json, "list"),
    "coco": partial(_from_json, "coco"),
    "karpathy": partial(_from_json, "karpathy"),
    "flickr30k": _flickr30k,
    "table": _table,
}


def read_records(kind: str, source: Annotations) -> Records:
    """All that an annotation file holds.

    Raises:
        UserError: the image folder or the file is missing, or the file is not of that format.
    """
    if not source.images.is_dir():
        raise UserError(f"--images: expected the folder of the images, got {source.images}, which is none")
    found = Records()
    FORMATS[kind](source, found)
    if not found.records and not found.rejects:
        chosen = f" of split {source.split}" if source.split else ""
        raise UserError(f"{_WHERE}: {source.file or source.images}: expected records{chosen}, found none")
    return found


def pairs(records: list[Record]) -> list[Record]:
    """One record per caption, instead of one per image."""
    return [replace(record, captions=(caption,)) for record in records for caption in record.captions]
