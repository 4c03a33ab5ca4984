"""A suite's results in the papers' columns: in the terminal, as Markdown and as JSON.

A column is a mean over data sets. Where some are missing it says over how many it was taken, and which are missing is
said by name: a mean over a part is never shown as if it were the whole. Imports no torch.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from amclr_scale.evaluation.suites.catalogue import Column, Suite
from amclr_scale.evaluation.suites.catalogue import suite as suite_of

WIDEST = 120  # characters that a terminal is taken to have
Results = Mapping[str, Mapping[str, Any]]  # by data set: what its file holds


@dataclass(frozen=True)
class Mean:
    """A column of one model.

    Attributes:
        value: a share of one; None: nothing of it was measured.
        over: the data sets that it was taken over.
        missing: those it lacks.
    """

    value: float | None
    over: tuple[str, ...]
    missing: tuple[str, ...]

    def words(self) -> str:
        """In percent, with how many data sets of how many where some are missing."""
        if self.value is None:
            return "-"
        part = f" ({len(self.over)} of {len(self.over) + len(self.missing)})" if self.missing else ""
        return f"{100 * self.value:.1f}{part}"


def mean(column: Column, results: Results) -> Mean:
    """A column, over the data sets that were measured."""
    there = [(name, key) for name, key in column.over if key in results.get(name, {}).get("numbers", {})]
    missing = tuple(name for name, key in column.over if (name, key) not in there)
    values = [float(results[name]["numbers"][key]) for name, key in there]
    return Mean(sum(values) / len(values) if values else None, tuple(name for name, _ in there), missing)


def columns(suite: Suite, results: Results) -> dict[str, Mean]:
    """Every column of a suite, by its title."""
    return {column.title: mean(column, results) for column in suite.columns}


def summary(suite: Suite, results: Results, about: Mapping[str, Any]) -> dict[str, Any]:
    """What SUITE.json holds.

    Args:
        about: the model, and how it was measured.
    """
    found = columns(suite, results)
    return {
        "suite": suite.name,
        **about,
        "columns": {
            title: {"value": one.value, "over": list(one.over), "missing": list(one.missing)}
            for title, one in found.items()
        },
        "sets": dict(results),
        "missing": {one.name: list(one.places) for one in suite.sets if one.name not in results},
    }


def _rows(models: Mapping[str, Mapping[str, Any]]) -> tuple[list[list[str]], list[list[str]]]:
    """A row for each model and column, and a row for each data set."""
    suite = suite_of(next(iter(models.values()))["suite"])
    means = {name: columns(suite, one["sets"]) for name, one in models.items()}
    above = [["", *(column.title for column in suite.columns)]]
    above += [[name, *(one.words() for one in found.values())] for name, found in means.items()]
    below = [["", "measure", "items", *models]]
    for one in suite.sets:
        there = [model["sets"][one.name] for model in models.values() if one.name in model["sets"]]
        if there:
            cells = [_cell(model["sets"].get(one.name), one.number) for model in models.values()]
            below.append([one.title, one.words, f"{there[0]['items']:,}", *cells])
    return above, below


def _cell(found: Mapping[str, Any] | None, number: str) -> str:
    if found is None:
        return "-"
    ends = [found["numbers"].get(f"{number}/{end}") for end in ("low", "high")]
    interval = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if None not in ends else ""
    return f"{100 * found['value']:.1f}{interval}"


def missing_in_words(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is missing, by name, and where it was looked for; nothing where all is there."""
    suite = suite_of(next(iter(models.values()))["suite"])
    lines = []
    for name, one in models.items():
        if gone := [a for a in suite.sets if a.name not in one["sets"]]:
            listed = "; ".join(f"{a.title} ({a.places[0]})" for a in gone)
            lines.append(f"{name}: missing {len(gone)} of {len(suite.sets)} data sets: {listed}")
    return lines


def in_terminal(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables of one suite as text.

    Args:
        models: what `summary` gave, by the model's name.
    """
    out = io.StringIO()
    above, below = _rows(models)
    if _width(above) > WIDEST:  # what does not fit beside one another stands below one another
        above = [list(row) for row in zip(*above, strict=True)]
    for rows, title in ((above, f"{_title(models)}, %"), (below, "by data set, %")):
        grid = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        for place, heading in enumerate(rows[0]):
            grid.add_column(heading, justify="left" if place == 0 or heading == "measure" else "right")
        for row in rows[1:]:
            grid.add_row(*row)
        Console(file=out, width=max(100, _width(rows)), force_terminal=False).print(grid)
    return "\n".join([out.getvalue().rstrip(), *missing_in_words(models)])


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 4 for column in zip(*rows, strict=True))


def _title(models: Mapping[str, Mapping[str, Any]]) -> str:
    return suite_of(next(iter(models.values()))["suite"]).title


def markdown(models: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as Markdown."""
    above, below = _rows(models)
    precision = ", ".join(f"{name}: {one['precision']}" for name, one in models.items() if "precision" in one)
    lines = [
        f"# {_title(models)}",
        "",
        f"In percent, with 95 % intervals where they are known. {precision}".strip(),
        "",
    ]
    lines += [*_table(above), "", *_table(below)]
    if gone := missing_in_words(models):
        lines += ["", *(f"- {line}" for line in gone)]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    heading, *rest = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [f"| {' | '.join(heading)} |", "|---" * len(heading) + "|", *(f"| {' | '.join(row)} |" for row in rest)]
