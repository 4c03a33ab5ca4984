"""Tables whose cells have types: JSON lines, parquet, arrow, and folders that Hugging Face's `datasets` has saved.

Pictures inside such a table (a column of bytes, or of {bytes, path} as `datasets` writes them) are not read with it: a
cell holds a `StoredPicture`, and `read_pictures` fetches some of them later, in the process that wants them.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from amclr_scale.data.formats.tables import RejectedRow, Row, Table, encoding_name, read_text
from amclr_scale.errors import UserError

KINDS = (".jsonl", ".ndjson", ".parquet", ".arrow")


@dataclass(frozen=True, order=True)
class StoredPicture:
    """Where in a parquet or arrow file the bytes of a picture are."""

    file: Path
    part: int  # row group of a parquet file, record batch of an arrow file
    row: int  # in the part
    column: str
    number: int  # of the row in the file

    def __str__(self) -> str:
        return f"{self.file.name}#{self.number}"


def is_typed(file: Path) -> bool:
    """Whether a table is one of these."""
    return file.is_dir() or file.suffix.lower() in KINDS


def read_typed_table(file: Path, split: str | None = None) -> Table:
    """All rows of a .jsonl, a .parquet, an .arrow, a folder of parquet or arrow files.

    Args:
        split: of a folder that holds several: which, or several with commas between them.

    Raises:
        UserError: it cannot be read.
    """
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        return _json_lines(file)
    files = _files_of(file, split)
    table = Table(None, dialect=_words(file, files))
    for one in files:
        columns, rows = _read(one)
        table.columns = table.columns or columns
        if table.columns != columns:
            raise UserError(
                f"--annotations: {one}: expected the columns {table.columns} of {files[0].name}, got {columns}"
            )
        before = len(table.rows)
        table.rows.extend(Row(before + number, cells) for number, cells in enumerate(rows))
    return table


def _words(given: Path, files: list[Path]) -> str:
    kind = files[0].suffix[1:]
    return kind if given.is_file() else f"{len(files):,} .{kind} file{'s' if len(files) > 1 else ''}"


def _files_of(given: Path, split: str | None) -> list[Path]:
    """The files of a table, in order."""
    if given.is_file():
        return [given]
    if not given.is_dir():
        raise UserError(f"--annotations: expected a table, got {given}, which does not exist")
    parts = _splits_of(given)
    if parts:
        wanted = split.split(",") if split else list(parts) if len(parts) == 1 else []
        if not wanted or not set(wanted) <= set(parts):
            raise UserError(f"--split: expected one or several of {', '.join(parts)} of {given}, got {split}")
        return [file for name in wanted for file in _files_of(parts[name], None)]
    state = given / "state.json"
    if state.is_file():
        content = json.loads(state.read_text("utf-8"))
        if content.get("_indices_files"):
            raise UserError(f"--annotations: {given} was saved with a separate order of its rows; save it again")
        return [given / one["filename"] for one in content["_data_files"]]
    for kind in ("*.arrow", "*.parquet"):
        if found := sorted(given.glob(kind)):
            return found
    raise UserError(f"--annotations: expected .arrow or .parquet files in {given}, found none")


def _splits_of(folder: Path) -> dict[str, Path]:
    """The splits of a `datasets.DatasetDict`."""
    listed = folder / "dataset_dict.json"
    if not listed.is_file():
        return {}
    return {str(name): folder / str(name) for name in json.loads(listed.read_text("utf-8"))["splits"]}


def _pyarrow(module: str, file: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"--annotations: {file} needs pyarrow; pip install pyarrow") from error


def _parts(file: Path) -> Iterator[tuple[int, Any]]:
    """The row groups or record batches of a file; of an arrow file nothing is read before it is looked at."""
    if file.suffix.lower() == ".parquet":
        opened = _pyarrow("pyarrow.parquet", file).ParquetFile(file)
        kept = [name for name, kind in zip(opened.schema_arrow.names, opened.schema_arrow.types, strict=True)
                if not _holds_bytes(kind)]  # fmt: skip
        for part in range(opened.num_row_groups):
            yield part, opened.read_row_group(part, columns=kept)
    else:
        yield from enumerate(_arrow_batches(file))


def _arrow_batches(file: Path) -> Iterator[Any]:
    """Of the stream format, which `datasets` writes, or of the file format."""
    pa = _pyarrow("pyarrow", file)
    with pa.memory_map(str(file)) as mapped:
        if mapped.read(6) == b"ARROW1":
            opened = pa.ipc.open_file(mapped)
            yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
        else:
            mapped.seek(0)
            yield from pa.ipc.open_stream(mapped)


def _read(file: Path) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
    """The columns of a file, and its rows; pictures as where they are."""
    pa = _pyarrow("pyarrow", file)
    try:
        if file.suffix.lower() == ".parquet":
            schema = _pyarrow("pyarrow.parquet", file).ParquetFile(file).schema_arrow
        else:
            schema = next(iter(_arrow_batches(file))).schema
    except (OSError, ValueError, StopIteration, pa.ArrowException) as error:
        raise UserError(f"--annotations: {file}: expected a parquet or arrow file with rows, got {error!r}") from error
    stored = {name for name, kind in zip(schema.names, schema.types, strict=True) if _holds_bytes(kind)}

    def rows() -> Iterator[tuple[Any, ...]]:
        before = 0
        for part, content in _parts(file):
            plain = {name: content.column(name).to_pylist() for name in schema.names if name not in stored}
            for row in range(content.num_rows):
                yield tuple(
                    StoredPicture(file, part, row, name, before + row) if name in stored else plain[name][row]
                    for name in schema.names
                )
            before += content.num_rows

    return list(schema.names), rows()


def _holds_bytes(kind: Any) -> bool:
    """Whether a column holds pictures: bytes, or {bytes, path}."""
    types = import_module("pyarrow").types
    if types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def read_pictures(wanted: Iterable[StoredPicture]) -> Iterator[tuple[StoredPicture, bytes | str | None]]:
    """Bytes, or the path that stands in their place, or None; in the order of the files, each part read once."""
    for (file, column), listed in groupby(sorted(wanted), key=lambda one: (one.file, one.column)):
        parts = {part: list(ones) for part, ones in groupby(listed, key=lambda one: one.part)}
        if file.suffix.lower() == ".parquet":
            opened = _pyarrow("pyarrow.parquet", file).ParquetFile(file)
            contents = ((part, opened.read_row_group(part, columns=[column])) for part in parts)
        else:
            contents = ((part, batch) for part, batch in enumerate(_arrow_batches(file)) if part in parts)
        for part, content in contents:
            held = content.column(column)
            yield from ((one, _bytes_or_path(held[one.row].as_py())) for one in parts[part])


def _bytes_or_path(cell: Any) -> bytes | str | None:
    if isinstance(cell, dict):
        return cell["bytes"] or cell.get("path")
    return cell if isinstance(cell, bytes) else None


def _json_lines(file: Path) -> Table:
    text, encoding = read_text(file)
    columns: dict[str, None] = {}
    objects: list[tuple[int, dict[str, Any]]] = []
    table = Table([], dialect=f"JSON lines, {encoding_name(encoding)}")
    lines = ((line, words) for line, words in enumerate(text.split("\n"), 1) if words.strip())
    for number, (line, words) in enumerate(lines):
        try:
            content = json.loads(words)
        except ValueError as error:
            table.rejected.append(RejectedRow(number, line, "not JSON", str(error)))
            continue
        if not isinstance(content, dict):
            table.rejected.append(RejectedRow(number, line, "not JSON", f"expected an object, got {words[:40]}"))
            continue
        columns |= dict.fromkeys(content)
        objects.append((number, content))
    table.columns = list(columns)
    table.rows = [Row(number, tuple(content.get(name) for name in columns)) for number, content in objects]
    return table
