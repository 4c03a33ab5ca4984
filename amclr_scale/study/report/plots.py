"""The figures of a report: one style, colours that the colour-blind can tell apart, a marker for every arm.

Palette: Okabe and Ito, "Color Universal Design", 2008. Intervals are the t intervals over seeds; a metric that is a
share is in percent. Every figure carries its numbers for a CSV.
"""

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from amclr_scale.study.analysis.comparison import Comparison, Outcome
from amclr_scale.study.analysis.groups import Group
from amclr_scale.study.analysis.results import Run
from amclr_scale.study.analysis.units import Unit
from amclr_scale.study.report.document import Figure
from amclr_scale.study.report.tables import flops_of, mean_of, raw_estimate

COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
    "grid.linewidth": 0.6, "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False,
    "svg.hashsalt": "amclr_scale", "figure.dpi": 100, "axes.axisbelow": True,
}  # fmt: skip
LEGEND_WIDTH, LEGEND_HANDLE = 110, 6  # characters of a row, and of a line with its gap
WIDTH = 7.2  # inches: a page of paper between its margins


def pyplot() -> Any:
    """Matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


class Looks:
    """The same colour, marker and line for a method in every figure, finished or not."""

    def __init__(self, titles: Iterable[str]):
        self._place = {title: place for place, title in enumerate(dict.fromkeys(titles))}

    def __call__(self, title: str) -> dict[str, Any]:
        place = self._place[title]
        return {
            "color": COLOURS[place % len(COLOURS)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": ("-", "--", ":")[place // len(COLOURS) % 3],
            "label": title,
        }


def finish(name: str, caption: str, figure: Any, raw: Sequence[dict[str, Any]]) -> Figure:
    """Both pictures of a figure, and let go of it."""
    pictures = {}
    for kind in ("png", "svg"):
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=160, bbox_inches="tight", metadata=metadata)
        pictures[kind] = out.getvalue()
        figure.set_layout_engine("none")  # found once; the second picture keeps it
    pyplot().close(figure)
    return Figure(name, caption, raw, pictures["png"], pictures["svg"])


def _methods(groups: Iterable[Group]) -> dict[str, list[Group]]:
    found: dict[str, list[Group]] = {}
    for group in groups:
        found.setdefault(group.title, []).append(group)
    return {title: sorted(members, key=lambda g: g.global_batch_size) for title, members in found.items()}


def batch_axis(axes: Any, groups: Sequence[Group]) -> None:
    """Batch sizes on a logarithmic x axis, each with its tick."""
    batches = sorted({group.global_batch_size for group in groups})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch:,}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlim(batches[0] / 2**0.5, batches[-1] * 2**0.5)
    axes.set_xlabel("global batch size B")


def legend(figure: Any, axes: Any, *, columns: int = 5) -> None:
    """Below the figure, each method once."""
    handles, labels = axes.get_legend_handles_labels()
    columns = columns_of_legend(labels, columns)
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)


def columns_of_legend(labels: Sequence[str], most: int = 5) -> int:
    """As many as the width of a page has room for, in rows of about equal length."""
    fitting = max(1, min(most, LEGEND_WIDTH // (max(map(len, labels), default=0) + LEGEND_HANDLE)))
    return -(-len(labels) // -(-len(labels) // fitting)) if labels else 1


def _half(outcome: Outcome, group: Group) -> float:
    """Half the interval over seeds; 0 with one seed."""
    mean = outcome.mean(group)
    low, high = mean.seeds.interval() if mean else (math.nan, math.nan)
    return 0.0 if math.isnan(low) else (high - low) / 2


def score_by_batch(
    outcome: Outcome, unit: Unit, looks: Looks, name: str, reference: Group | None, margin: float
) -> Figure:
    """The metric against batch size, one line per method; the reference with its margin across."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    methods = _methods(outcome.groups)
    raw = []
    base = outcome.mean(reference) if reference is not None else None
    if base is not None and reference is not None:
        value, scale = base.seeds.value, unit.factor
        axes.axhspan(scale * (value - margin), scale * (value + margin), color="0.5", alpha=0.15, linewidth=0)
        axes.axhline(scale * value, color="0.35", linewidth=1, linestyle=(0, (1, 1.5)),
                     label=f"{reference.name}, with the margin")  # fmt: skip
    for place, (title, members) in enumerate(methods.items()):
        shift = 2 ** (0.045 * (place - (len(methods) - 1) / 2))  # side by side, so that intervals do not cover another
        known = [(group, mean) for group in members if (mean := outcome.mean(group))]
        if not known:
            continue
        axes.errorbar(
            [group.global_batch_size * shift for group, _ in known],
            [unit.factor * mean.seeds.value for _, mean in known],
            [unit.factor * _half(outcome, group) for group, _ in known],
            elinewidth=0.9, capsize=2, **looks(title),
        )  # fmt: skip
        raw += [
            {"title": title, "global_batch_size": group.global_batch_size, **raw_estimate("score", mean)}
            for group, mean in known
        ]
    batch_axis(axes, outcome.groups)
    if unit.share:  # an interval may reach where no share can
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, 0), min(high, 100))
    axes.set_ylabel(f"{outcome.metric.name}{', %' if unit.share else ''}")
    legend(figure, axes, columns=3)
    caption = f"{outcome.metric.name} against global batch size; bars: 95 % t intervals over seeds."
    return finish(name, caption, figure, raw)


def differences(
    compared: Sequence[Comparison],
    unit: Unit,
    looks: Looks,
    name: str,
    caption: str,
    margin: float,
    *,
    both: bool = False,
) -> Figure:
    """Every difference with both its intervals, over the margin of equivalence; `both` as in the table."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 1.1 + 0.26 * len(compared)), layout="constrained")
    axes.axvspan(-unit.factor * margin, unit.factor * margin, color="0.5", alpha=0.18, linewidth=0)
    axes.axvline(0, color="0.35", linewidth=0.9)
    raw, labels = [], []
    for place, one in enumerate(compared):
        look = looks(one.group.title)
        for estimate, width, alpha in ((one.difference.items, 1.0, 0.75), (one.difference.seeds, 2.6, 1.0)):
            low, high = estimate.interval() if estimate else (math.nan, math.nan)
            axes.plot([unit.factor * low, unit.factor * high], [place, place], color=look["color"], linewidth=width,
                      alpha=alpha, solid_capstyle="butt")  # fmt: skip
        axes.plot(unit.factor * one.difference.seeds.value, place, marker=look["marker"], color=look["color"],
                  markeredgecolor="white", markeredgewidth=0.6, markersize=6.5)  # fmt: skip
        labels.append(f"{one.pair if both else one.group.name} ({one.decision.verdict})")
        raw.append({"arm": one.group.name, "against": one.base.name, **raw_estimate("difference", one.difference),
                    "verdict": one.decision.verdict, "margin": margin})  # fmt: skip
    axes.set_yticks(range(len(compared)), labels)
    axes.set_ylim(len(compared) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"difference{' in points' if unit.share else ''}; grey: the declared margin")
    return finish(name, caption, figure, raw)


def by_batch(
    groups: Sequence[Group], looks: Looks, quantity: str, label: str, name: str, caption: str
) -> Figure | None:
    """A cost of every method against batch size; None where no run says it."""
    rows: list[dict[str, Any]] = [
        {"title": group.title, "global_batch_size": group.global_batch_size, quantity: value}
        for group in groups
        if (value := mean_of(group.runs, quantity)) is not None
    ]
    if not rows:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.4), layout="constrained")
    for title in dict.fromkeys(row["title"] for row in rows):
        mine = sorted((row for row in rows if row["title"] == title), key=lambda row: row["global_batch_size"])
        axes.plot([row["global_batch_size"] for row in mine], [row[quantity] for row in mine], **looks(str(title)))
    batch_axis(axes, groups)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    legend(figure, axes)
    return finish(name, caption, figure, rows)


def score_by_cost(
    outcome: Outcome, unit: Unit, looks: Looks, quantity: str, label: str, name: str, caption: str
) -> Figure | None:
    """The metric against what it cost; the larger the marker, the larger the batch."""
    rows: list[dict[str, Any]] = []
    for group in outcome.groups:
        cost = mean_of(group.runs, quantity) if quantity != "tflop" else (flops_of(group) or 0) / 1e12
        mean = outcome.mean(group)
        if cost and mean:
            rows.append({"title": group.title, "global_batch_size": group.global_batch_size, quantity: cost,
                         **raw_estimate("score", mean)})  # fmt: skip
    if not rows:
        return None
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(WIDTH, 3.8), layout="constrained")
    sizes = sorted({row["global_batch_size"] for row in rows})
    large = {batch: 4 + 2.2 * place for place, batch in enumerate(sizes)}
    minutes = quantity == "hours" and max(row["hours"] for row in rows) < 1
    factor, label = (60, "minutes") if minutes else (1, label)
    costs = [factor * row[quantity] for row in rows]
    for title in dict.fromkeys(row["title"] for row in rows):
        mine = sorted((row for row in rows if row["title"] == title), key=lambda row: row["global_batch_size"])
        x, y = [factor * row[quantity] for row in mine], [unit.factor * row["score"] for row in mine]
        look = looks(str(title))
        axes.plot(x, y, color=look["color"], linestyle=look["linestyle"], linewidth=0.8, alpha=0.6)
        for row, cost, score in zip(mine, x, y, strict=True):
            axes.plot(
                cost, score, marker=look["marker"], color=look["color"], linestyle="none",
                markersize=large[row["global_batch_size"]], markeredgecolor="white", markeredgewidth=0.5,
            )  # fmt: skip
        axes.plot([], [], color=look["color"], marker=look["marker"], linestyle="none", label=title)
    for batch in sizes:
        axes.plot([], [], color="0.6", marker="o", linestyle="none", markersize=large[batch], label=f"B = {batch:,}")
    if max(costs) > 20 * min(costs):
        axes.set_xscale("log")
        axes.set_xticks(ticks_of(min(costs), max(costs)))
        axes.xaxis.set_major_formatter(plain_number)
        axes.minorticks_off()
    else:
        axes.set_xlim(0, 1.08 * max(costs))
    axes.set_xlabel(label)
    axes.set_ylabel(f"{outcome.metric.name}{', %' if unit.share else ''}")
    legend(figure, axes)
    return finish(name, caption, figure, rows)


def ticks_of(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, ... around a range."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**decade for decade in decades for step in (1, 2, 5) if low / 2 < step * 10.0**decade < 2 * high]


def plain_number(value: float, _: int) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def heat_map(outcome: Outcome, unit: Unit, name: str) -> Figure | None:
    """Gradient batch against negatives per anchor, for CLIP; None where these were not varied apart."""

    def plain(run: Run) -> bool:
        """The pair alone, in groups whose size is an option."""
        found = run.objective
        return found is not None and found.by.group_option is not None and not found.inputs.count("image_views")

    known = [
        (group, mean, group.runs[0].cell.negatives)
        for group in outcome.groups
        if plain(group.runs[0]) and (mean := outcome.mean(group)) and group.runs[0].cell.negatives is not None
    ]
    negatives = sorted({float(count) for _, _, count in known if count is not None})
    batches = sorted({group.global_batch_size for group, *_ in known})
    apart = any(count is not None and count < group.global_batch_size - 1 for group, _, count in known)
    if len(negatives) < 2 or not apart:
        return None
    plt = pyplot()
    values = np.full((len(batches), len(negatives)), np.nan)
    raw = []
    for group, mean, count in known:
        assert count is not None
        values[batches.index(group.global_batch_size), negatives.index(float(count))] = unit.factor * mean.seeds.value
        raw.append({"title": group.title, "global_batch_size": group.global_batch_size, "negatives": count,
                    **raw_estimate("score", mean)})  # fmt: skip
    figure, axes = plt.subplots(figsize=(WIDTH * 0.75, 1.4 + 0.5 * len(batches)), layout="constrained")
    drawn = axes.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8,
                      color="white" if value < middle else "black")  # fmt: skip
    axes.set_xticks(range(len(negatives)), [f"{count:,.0f}" for count in negatives])
    axes.set_yticks(range(len(batches)), [f"{batch:,}" for batch in batches])
    axes.grid(visible=False)
    axes.set_xlabel("negatives per anchor")
    axes.set_ylabel("gradient batch B")
    figure.colorbar(drawn, label=f"{outcome.metric.name}{', %' if unit.share else ''}")
    return finish(name, f"{outcome.metric.name} by gradient batch and negatives per anchor, CLIP.", figure, raw)
