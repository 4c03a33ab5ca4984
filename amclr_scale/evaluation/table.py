"""Results as tables: each number in percent, its 95 % interval, and below what guessing gives."""

import io
from collections.abc import Mapping

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

DETAILS = ("chance", "stderr", "low", "high")

# A table: its first column's heading, its rows by the prefix of their numbers, its columns by the rest of the name.
RETRIEVAL = (
    "retrieval",
    {
        "image_to_text": "image to text",
        "text_to_image": "text to image",
        "text_to_image_filtered": "text to image, filtered",
    },
    {"R@1": "R@1", "R@5": "R@5", "R@10": "R@10", "R@mean": "mean", "median_rank": "median rank"},
)
ACCURACY = (
    "classification",
    {
        "zero_shot": "zero-shot",
        "probe": "linear",
        "knn": "kNN",
        "probe_tower": "linear, before head",
        "knn_tower": "kNN, before head",
    },
    {"top1": "top 1", "top3": "top 3", "top5": "top 5", "top10": "top 10", "mean_per_class": "mean per class"},
)


def table(results: Mapping[str, float], *, width: int = 130) -> str:
    """Flat results (`split/name`, `split/name/low`, ...) as text, split by split.

    Shares are in percent with their 95 % interval; ranks, counts and geometry stand as they are.
    """
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=False)
    for split, found in _by_split(results).items():
        left = dict(found)
        for heading, rows, columns in (RETRIEVAL, ACCURACY):
            made = _grid(found, left, f"{split}: {heading}", rows, columns)
            if made is not None:
                console.print(made)
        rest = [f"{name.replace('_', ' ')} {_plain(found, name)}" for name in left if "/" not in name]
        if rest:
            console.print(", ".join(rest), end="\n\n")
    return out.getvalue().rstrip()


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


def _grid(
    found: Mapping[str, float],
    left: dict[str, float],
    heading: str,
    rows: Mapping[str, str],
    columns: Mapping[str, str],
) -> Table | None:
    present = {row: words for row, words in rows.items() if any(f"{row}_{column}" in found for column in columns)}
    if not present:
        return None
    shown = [column for column in columns if any(f"{row}_{column}" in found for row in present)]
    grid = Table(title=f"{heading}, %", title_justify="left", title_style="bold", box=SIMPLE_HEAD)
    grid.add_column("")
    for column in shown:
        grid.add_column(columns[column], justify="right")
    chance: dict[str, set[str]] = {column: set() for column in shown}
    for row, words in present.items():
        cells = []
        for column in shown:
            name = f"{row}_{column}"
            for key in (name, *(f"{name}/{detail}" for detail in DETAILS)):
                left.pop(key, None)
            cells.append(_plain(found, name) if name in found else "")
            if f"{name}/chance" in found:
                chance[column].add(f"{100 * found[f'{name}/chance']:.2f}")
        grid.add_row(words, *cells)
    if any(chance.values()):
        grid.add_section()
        grid.add_row("chance", *(" / ".join(sorted(chance[column], reverse=True)) for column in shown))
    return grid


def _plain(found: Mapping[str, float], name: str) -> str:
    value = found[name]
    if f"{name}/stderr" not in found:
        return f"{value:,.0f}" if value.is_integer() else f"{value:,.4g}"
    if f"{name}/low" not in found:
        return f"{100 * value:.1f} +- {100 * found[f'{name}/stderr']:.1f}"
    return f"{100 * value:.1f} [{100 * found[f'{name}/low']:.1f}, {100 * found[f'{name}/high']:.1f}]"
