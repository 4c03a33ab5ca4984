"""A leaderboard as text, Markdown, CSV or JSON. Imports no torch."""

import csv
import io
import json
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from amclr_scale.evaluation.suites.leaderboard import Leaderboard, Row
from amclr_scale.evaluation.suites.summary import WIDEST

MARK = "*"  # behind the heading of a column that does not compare


def _heading(board: Leaderboard) -> list[str]:
    return ["", "arm", "batch", "samples", *(f"{one}{MARK if one in board.differs else ''}" for one in board.columns)]


def _cells(board: Leaderboard, row: Row) -> list[str]:
    about = [row.name, row.arm or "", *(f"{n:,}" if n is not None else "" for n in (row.batch, row.samples))]
    return [*about, *(_share(row, column) for column in board.columns)]


def _share(row: Row, column: str) -> str:
    one = row.entries.get(column)
    if one is None:
        return "-"
    return f"{100 * one.value:.1f}{f' ({one.part})' if one.part else ''}"


def notes(board: Leaderboard) -> list[str]:
    """By what the rows are sorted, and which columns do not compare."""
    lines = [f"sorted by {board.sorted_by}; in percent"]
    lines += [f"not comparable{MARK} {column}: the rows differ in {why}" for column, why in board.differs.items()]
    return lines


def as_text(board: Leaderboard) -> str:
    """A table for the terminal; upright, with a column for each run, where it would be too wide otherwise."""
    rows = [_heading(board), *(_cells(board, row) for row in board.rows)]
    rows[0] = [heading.replace(": ", ":\n") for heading in rows[0]]
    upright = [[heading.replace("\n", " "), *cells] for heading, *cells in zip(*rows, strict=True)]
    if _width(rows) > WIDEST and _width(upright) < _width(rows):
        rows = upright
    grid = Table(box=SIMPLE_HEAD)
    for place, heading in enumerate(rows[0]):
        grid.add_column(heading, justify="left" if place == 0 else "right")
    for row in rows[1:]:
        grid.add_row(*row)
    out = io.StringIO()
    plain = Console(file=out, width=max(100, _width(rows)), force_terminal=False, markup=False, emoji=False)
    plain.print(grid)
    return "\n".join([out.getvalue().rstrip(), *notes(board)]) + "\n"


def _width(rows: Sequence[Sequence[str]]) -> int:
    widest = (max(len(part) for cell in column for part in cell.split("\n")) for column in zip(*rows, strict=True))
    return sum(width + 3 for width in widest)


def as_markdown(board: Leaderboard) -> str:
    """A table of Markdown, and the notes below it."""
    rows = [_heading(board), *(_cells(board, row) for row in board.rows)]
    heading, *rest = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in row] for row in rows)
    lines = [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *(f"| {' | '.join(row)} |" for row in rest)]
    said = [f"- {line}".replace("*", "\\*") for line in notes(board)]
    return "\n".join([*lines, "", *said]) + "\n"


def as_csv(board: Leaderboard) -> str:
    """Shares of one with all their digits; columns that do not compare have the mark behind their heading.

    Beside a column with means over a part of its data sets stands one that says over how many.
    """
    parts = {column for column in board.columns if any(_part(row, column) for row in board.rows)}
    marked = {column: f"{column}{MARK if column in board.differs else ''}" for column in board.columns}
    heading = ["name", "arm", "batch", "samples"]
    heading += [one for c in board.columns for one in (marked[c], *([f"{c}: over"] if c in parts else []))]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heading)
    for row in board.rows:
        cells: list[object] = [row.name, row.arm, row.batch, row.samples]
        for column in board.columns:
            one = row.entries.get(column)
            cells += [one.value if one else None, *([_part(row, column)] if column in parts else [])]
        writer.writerow(["" if cell is None else cell for cell in cells])
    return out.getvalue()


def _part(row: Row, column: str) -> str:
    return row.entries[column].part if column in row.entries else ""


def as_json(board: Leaderboard) -> str:
    """Everything."""
    rows = [
        {
            "name": row.name, "arm": row.arm, "batch": row.batch, "samples": row.samples,
            "numbers": {title: {"value": one.value, "over": one.part or "all"} for title, one in row.entries.items()},
        }
        for row in board.rows
    ]  # fmt: skip
    content = {"sorted_by": board.sorted_by, "columns": board.columns, "not_comparable": board.differs, "rows": rows}
    return json.dumps(content, indent=1) + "\n"


FORMATS: dict[str, Callable[[Leaderboard], str]] = {
    "text": as_text, "markdown": as_markdown, "csv": as_csv, "json": as_json,
}  # fmt: skip
