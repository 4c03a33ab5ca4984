"""Tables of captions as people hold them: separated text in any common dialect.

The dialect is decided from the whole first block. Of comma, tab, semicolon and bar that separator is taken under which
a header is known, a column holds pictures, and most rows have equally many cells. In commas and semicolons quotes hold
cells together, as CSV has them; between tabs and bars they do where that makes rows whole, and are ordinary marks
otherwise (CC3M). Nothing vanishes: a row is read, or it is listed with the reason.

    read_table(Path("captions.csv"), HeaderWords(frozenset({"image", "caption"})))  -> Table(columns, rows, ...)
"""

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.errors import UserError

Quoting = Literal["csv", "none"]
SEPARATORS = {"tab": "\t", "bar": "|", "semicolon": ";", "comma": ","}  # the rarer in prose, the earlier
LARGEST_CELL = 2**17  # characters: no caption or path is longer
_BLOCK = 2**22  # characters from which the dialect is decided
_OWN = {".tsv": "\t", ".tab": "\t", ".csv": ","}
_ALWAYS_CSV = (",", ";")
_BOMS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))


@dataclass(frozen=True)
class Dialect:
    """How a text is cut into cells."""

    separator: str
    quoting: Quoting
    encoding: str

    def __str__(self) -> str:
        name = next(name for name, mark in SEPARATORS.items() if mark == self.separator)
        quotes = "quoted as in CSV" if self.quoting == "csv" else "no quotes"
        return f"separated by {name}, {quotes}, {encoding_name(self.encoding)}"


@dataclass(frozen=True)
class HeaderWords:
    """By which words a header is recognised."""

    known: frozenset[str]  # two of them make a header, or as many as there are columns
    asked: frozenset[str] = frozenset()  # the user named these columns: all of them make one

    def are_in(self, cells: list[str]) -> bool:
        """Whether a first row names columns."""
        names = [column_name(cell) for cell in cells]
        return (bool(self.asked) and self.asked <= set(names)) or sum(n in self.known for n in names) >= min(
            2, len(names)
        )


@dataclass(frozen=True)
class Row:
    """One row of a table."""

    number: int  # of the rows below the header, from 0; blank lines are none
    cells: tuple[Any, ...]


@dataclass(frozen=True)
class RejectedRow:
    """A row that cannot be used, and why."""

    number: int
    line: int  # of the file, from 1, where it begins
    kind: str  # short row, long row, huge cell, not JSON
    detail: str


@dataclass
class Table:
    """What a file holds."""

    columns: list[str] | None  # of its header; None: it has none
    rows: list[Row] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)
    dialect: str = ""  # in words, as decided


def read_table(file: Path, header: HeaderWords, separator: str | None = None, quoting: Quoting | None = None) -> Table:
    """All rows of a separated text in any dialect.

    Args:
        file: the table.
        header: by which a header is recognised.
        separator, quoting: what to take instead of deciding: comma, tab, semicolon or bar; csv or none.

    Raises:
        UserError: the file cannot be read, is no table, or a quote is never closed.
    """
    text, encoding = read_text(file)
    mark, fit = _decide(file, text, header, SEPARATORS[separator] if separator else None, quoting)
    return _shaped(file, text, Dialect(mark, fit.style, encoding), fit, given=quoting is not None)


def read_text(file: Path) -> tuple[str, str]:
    """A text and its encoding: UTF-8, or UTF-16 by its mark or its zeros.

    Raises:
        UserError: it cannot be read, or is neither.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise UserError(f"--annotations: expected a table, got {file}, which cannot be read: {error}") from error
    encoding = next((name for mark, name in _BOMS if raw.startswith(mark)), None)
    if encoding is None and len(raw) > 3 and b"\0" in raw[:4]:  # UTF-16 without its mark, of a text in Latin letters
        encoding = "utf-16-be" if raw[:1] == b"\0" else "utf-16-le"
    encoding = encoding or "utf-8"
    try:
        return raw.decode(encoding), encoding
    except UnicodeDecodeError as error:
        raise UserError(
            f"--annotations: {file}: expected text in UTF-8 or UTF-16, got byte {raw[error.start]:#04x} at "
            f"{error.start:,}; save it as UTF-8 (iconv -f latin1 -t utf-8 makes it from a Western single-byte file)"
        ) from error


def encoding_name(encoding: str) -> str:
    """For the user: UTF-8, UTF-16."""
    return encoding.removesuffix("-sig").upper()


@dataclass(frozen=True)
class _Cut:
    """A row, and the lines that it was cut from."""

    line: int
    cells: list[str]
    lines: list[str]

    def plain(self, separator: str) -> list[list[str]]:
        """What the lines would be without quotes."""
        return [line.rstrip("\r\n").split(separator) for line in self.lines]


class _BadQuoteError(Exception):
    def __init__(self, line: int, words: str):
        super().__init__(line, words)
        self.line, self.words = line, words


def _rows(text: str, separator: str, quoting: Quoting) -> Iterator[_Cut]:
    """The rows of a text, without blank lines.

    Raises:
        _BadQuoteError: a quote is not closed, or closes inside a cell.
    """
    if quoting == "none":  # a line is a row: no quote can join two
        for number, words in enumerate(text.split("\n" if "\n" in text else "\r"), 1):
            if words.strip():
                yield _Cut(number, words.removesuffix("\r").split(separator), [words])
        return
    taken: list[str] = []

    def lines() -> Iterator[str]:
        for words in io.StringIO(text, newline=""):
            taken.append(words)
            yield words

    before = csv.field_size_limit(sys.maxsize)
    line = 1
    try:
        for cells in csv.reader(lines(), delimiter=separator, strict=True):
            if len(cells) > 1 or "".join(cells).strip():
                yield _Cut(line, cells, taken.copy())
            line += len(taken)
            taken.clear()
    except csv.Error as error:
        unclosed = "unexpected end" in str(error)
        raise _BadQuoteError(
            line, "a quote that is opened there is never closed" if unclosed else f"after a quote, {error}"
        ) from error
    finally:
        csv.field_size_limit(before)


@dataclass
class _Fit:
    """How well a text is cut by one separator."""

    style: Quoting
    header: bool
    whole: float  # share of the rows that have as many cells as the header, or as most
    pictures: float  # share of the rows with a picture's path in the column that has most of them
    width: int


def _decide(
    file: Path, text: str, header: HeaderWords, separator: str | None, quoting: Quoting | None
) -> tuple[str, _Fit]:
    """The separator and the quoting that fit the first block best."""
    cut = len(text) > _BLOCK
    block = text[: text.rfind("\n", 0, _BLOCK) + 1] if cut else text
    fits = {mark: _fit(block, mark, header, quoting) for mark in ([separator] if separator else SEPARATORS.values())}
    fits = {mark: fit for mark, fit in fits.items() if fit.width >= 2}
    if not fits:
        raise UserError(
            f"--annotations: {file}: expected rows of two cells or more, separated by comma, tab, semicolon or bar; "
            "--separator says which"
        )
    own = _OWN.get(file.suffix.lower())
    mark = max(fits, key=lambda mark: (fits[mark].header, fits[mark].pictures, fits[mark].whole, mark == own))
    return mark, fits[mark]


def _fit(text: str, mark: str, header_words: HeaderWords, quoting: Quoting | None) -> _Fit:
    plain = [cut.cells for cut in _rows(text, mark, "none")]
    header = bool(plain) and header_words.are_in(_unquoted(plain[0]))
    width = len(_columns(plain[0])) if header else _commonest(plain)
    style = quoting or ("csv" if mark in _ALWAYS_CSV or _quotes_hold(text, mark, width) else "none")
    found = plain
    if style == "csv":
        found = []
        try:
            found.extend(cut.cells for cut in _rows(text, mark, "csv"))
        except _BadQuoteError:  # what stands before it says enough; where nothing does, cells without quotes do
            found = found if len(found) > 1 else plain
        header = bool(found) and header_words.are_in(found[0])
        width = len(_columns(found[0])) if header else _commonest(found)
    body = [_trimmed(cells, width) for cells in found[header:]]
    whole = sum(len(cells) == width for cells in body) / max(1, len(body))
    pictures = Counter(place for cells in body for place, cell in enumerate(cells) if looks_like_picture(cell))
    return _Fit(style, header, whole, max(pictures.values(), default=0) / max(1, len(body)), width)


def _quotes_hold(text: str, mark: str, width: int) -> bool:
    """Whether quotes make rows whole that would be cut without them, or are doubled, or surround a whole column."""
    held, broken, rows = 0, 0, 0
    surrounded: Counter[int] = Counter()
    try:
        for cut in _rows(text, mark, "csv"):
            plain = cut.plain(mark)
            if len(cut.lines) > 1 or len(plain[0]) != len(cut.cells):
                apart = _swallowed(plain, width) or all(len(cells) == width for cells in plain)
                held, broken = held + (len(cut.cells) == width and not apart), broken + apart
                continue
            rows += 1
            pairs = [(place, cell) for place, cell in enumerate(plain[0]) if _is_quoted(cell)]
            surrounded.update(place for place, _ in pairs)
            held += any('""' in cell[1:-1] for _, cell in pairs)
    except _BadQuoteError:
        pass
    else:
        held += rows > 1 and any(count == rows for count in surrounded.values())
    return held > broken


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"'


def _unquoted(cells: list[str]) -> list[str]:
    return [cell.strip().strip('"') for cell in cells]


def _swallowed(plain: list[list[str]], width: int) -> bool:
    """Whether a line after the first is a row by itself, with its picture: then a quote has joined what it must not."""
    return any(len(cells) == width and any(map(looks_like_picture, cells)) for cells in plain[1:])


def _commonest(rows: list[list[str]]) -> int:
    widths = Counter(map(len, rows))
    return widths.most_common(1)[0][0] if widths else 0


def looks_like_picture(cell: str) -> bool:
    """Whether a cell is a picture's path or address, rather than a text that ends with one."""
    words = cell.strip().strip('"')
    if any(mark in words for mark in SEPARATORS.values()):
        return False
    return "://" in words[:10] or words.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def _columns(cells: list[str]) -> list[str]:
    """A header without the separators that spreadsheets end it with."""
    return _trimmed([cell.strip() for cell in cells], 2)


def _trimmed(cells: list[str], width: int) -> list[str]:
    """A row without empty cells beyond a width."""
    end = len(cells)
    while end > width and not cells[end - 1].strip():
        end -= 1
    return cells[:end]


def _shaped(file: Path, text: str, dialect: Dialect, fit: _Fit, *, given: bool) -> Table:
    """Header, rows of equal length, and the others.

    Args:
        given: the user says how the text is quoted, so that nothing about quotes is doubted.
    """
    rows = _rows(text, dialect.separator, dialect.quoting)
    try:
        table = Table(_columns(next(rows).cells) if fit.header else None, dialect=str(dialect))
        for number, cut in enumerate(rows):
            if len(cut.lines) > 1 and not given and _swallowed(cut.plain(dialect.separator), fit.width):
                words = f"a quote that is opened there joins {len(cut.lines):,} lines which are rows of their own"
                raise _BadQuoteError(cut.line, words)
            cells = tuple(cell.strip() for cell in _trimmed(cut.cells, fit.width))
            problem = _problem(cells, fit.width)
            if problem:
                table.rejected.append(RejectedRow(number, cut.line, *problem))
            else:
                table.rows.append(Row(number, cells))
    except _BadQuoteError as error:
        raise UserError(
            f"--annotations: {file}, line {error.line:,}: {error.words}; close it, double quotes inside quotes, or say "
            "--quoting none if quotes are ordinary marks"
        ) from error
    return table


def _problem(cells: tuple[str, ...], width: int) -> tuple[str, str] | None:
    if len(cells) < width:
        return "short row", f"{len(cells)} cells of {width}"
    if len(cells) > width:
        return "long row", f"{len(cells)} cells of {width}; a separator inside a cell needs quotes"
    longest = max(map(len, cells), default=0)
    return ("huge cell", f"{longest:,} characters") if longest > LARGEST_CELL else None


def column_name(cell: str) -> str:
    """A header's word without case and without what follows its first part: `Caption|en`, `image (jpg)`."""
    letters = "".join(c if c.isalnum() or c == "_" else " " for c in cell.lower()).split()
    return letters[0] if letters else ""
