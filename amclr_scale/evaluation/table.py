"""Results as tables: each number in percent, its 95 % interval, and below what guessing gives."""

import io
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from amclr_scale.metrics.scores import GROUPS, Group, is_share, words_of

DETAILS = ("chance", "stderr", "low", "high")


def table(results: Mapping[str, float], *, width: int = 130) -> str:
    """Flat results (`split/name`, `split/name/low`, ...) as text, split by split.

    Shares are in percent with their 95 % interval; ranks, counts and geometry stand as they are.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    for split, found in _by_split(results).items():
        left = dict(found)
        for group in GROUPS:
            made = _grid(found, left, split, group) if group.table else None
            if made is not None:
                console.print(made)
        rest = [f"{name.replace('_', ' ')} {_plain(found, name)}" for name in left if "/" not in name]
        if rest:
            console.print(", ".join(rest), end="\n\n")
    return out.getvalue().rstrip()


def side_by_side(models: Mapping[str, Mapping[str, float]]) -> str:
    """Several models' flat results as text: a table for each split, a row for each number, a column for each model."""
    out = io.StringIO()
    console = Console(file=out, width=max(130, 45 + 26 * len(models)), force_terminal=False)
    found = {name: _by_split(results) for name, results in models.items()}
    for split in dict.fromkeys(split for one in found.values() for split in one):
        grid = Table(title=split, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
        grid.add_column("")
        for name in (*models, "chance"):
            grid.add_column(name, justify="right", overflow="fold")
        columns = [one.get(split, {}) for one in found.values()]
        for name in dict.fromkeys(name for column in columns for name in column if "/" not in name):
            holds = next(column for column in columns if name in column)
            cells = [_plain(column, name) if name in column else "" for column in columns]
            grid.add_row(words_of(name) + (", %" if is_share(name, holds) else ""), *cells, _chance(holds, name))
        console.print(grid)
    return out.getvalue().rstrip()


def _chance(found: Mapping[str, float], name: str) -> str:
    """What guessing gives, where it is known."""
    guessed = found.get(f"{name}/chance")
    return "" if guessed is None else f"{100 * guessed:.2f}" if is_share(name, found) else f"{guessed:.4g}"


def _by_split(results: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Numbers by split; a detail stays beside its number as `name/detail`."""
    splits: dict[str, dict[str, float]] = {}
    for key, value in results.items():
        head, _, last = key.rpartition("/")
        if last in DETAILS:
            split, _, name = head.rpartition("/")
            splits.setdefault(split, {})[f"{name}/{last}"] = value
        else:
            splits.setdefault(head, {})[last] = value
    return splits


def _grid(found: Mapping[str, float], left: dict[str, float], split: str, group: Group) -> Table | None:
    """A group's numbers, taken out of what is left to be shown."""
    columns = group.scores
    rows = {row: words for row, words in group.rows.items() if row}
    present = {row: words for row, words in rows.items() if any(f"{row}_{column}" in found for column in columns)}
    if not present:
        return None
    shown = [column for column in columns if any(f"{row}_{column}" in found for row in present)]
    percent = ", %" if any(columns[column].unit == "points" for column in shown) else ""
    grid = Table(title=f"{split}: {group.heading}{percent}", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    grid.add_column("")
    for column in shown:
        grid.add_column(columns[column].label, justify="right")
    chance: dict[str, set[str]] = {column: set() for column in shown}
    for row, words in present.items():
        cells = []
        for column in shown:
            name = f"{row}_{column}"
            for key in (name, *(f"{name}/{detail}" for detail in DETAILS)):
                left.pop(key, None)
            cells.append(_plain(found, name) if name in found else "")
            if f"{name}/chance" in found:
                chance[column].add(_chance(found, name))
        grid.add_row(words, *cells)
    if any(chance.values()):
        grid.add_section()
        grid.add_row("chance", *(" / ".join(sorted(chance[column], reverse=True)) for column in shown))
    return grid


def _plain(found: Mapping[str, float], name: str) -> str:
    """A number with its interval, or its standard error, or alone."""

    def written(key: str) -> str:
        value = found[key]
        if is_share(name, found):
            return f"{100 * value:.1f}"
        return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"

    if f"{name}/stderr" not in found:
        return written(name)
    if f"{name}/low" not in found:
        return f"{written(name)} +- {written(f'{name}/stderr')}"
    return f"{written(name)} [{written(f'{name}/low')}, {written(f'{name}/high')}]"
