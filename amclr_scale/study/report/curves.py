"""The figures of a report that show training: scores, objectives and diagnostics against samples seen."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from amclr_scale.study.analysis.comparison import Outcome
from amclr_scale.study.analysis.groups import Group
from amclr_scale.study.analysis.units import Unit
from amclr_scale.study.report.document import Figure
from amclr_scale.study.report.plots import WIDTH, Looks, columns_of_legend, finish, pyplot

MOST_DIAGNOSTICS = 6
BINS = 40
FEW_POINTS = 30  # up to which a curve's points are marked
MEANS = "mean over seeds and over fortieths of the run"


def score_by_samples(outcome: Outcome, unit: Unit, looks: Looks, name: str) -> Figure | None:
    """The metric during training, a panel per batch size; None where it was measured at the end only."""
    metric = outcome.metric
    rows: list[dict[str, Any]] = []
    for group in outcome.groups:
        at: dict[float, list[float]] = {}
        for run in group.runs:
            for record in run.records:
                if all(f"eval/{key}" in record for key in metric.keys):
                    scores = {key: record[f"eval/{key}"] for key in metric.keys}
                    at.setdefault(record["samples"], []).append(metric.score(scores))
        rows += [
            {"title": group.title, "global_batch_size": group.global_batch_size, "samples": samples,
             "score": float(np.mean(scores)), "runs": len(scores)}
            for samples, scores in sorted(at.items())
        ]  # fmt: skip
    if len({row["samples"] for row in rows}) < 3:
        return None
    label = f"{metric.name}{', %' if unit.share else ''}"
    caption = f"{metric.name} during training, mean over seeds, against samples seen."
    scaled = [{**row, "y": unit.factor * row["score"]} for row in rows]
    return panels(name, caption, scaled, rows, panel="global_batch_size", line="title", label=label, looks=looks)


def objective_by_samples(groups: Sequence[Group], looks: Looks, name: str) -> Figure | None:
    """The training objective, a panel per method: their values are not comparable with one another."""
    rows = _logged(groups, "objective/objective") or _logged(groups, "loss")
    caption = f"Training objective against samples seen, {MEANS}. Values of different methods do not compare."
    scaled = [{**row, "y": row["value"]} for row in rows]
    return panels(name, caption, scaled, rows, panel="title", line="global_batch_size", label="objective", looks=looks)


def diagnostic_keys(groups: Sequence[Group]) -> list[str]:
    """What `run.diagnostics` logged in any run, the estimators' first; those behind MOST_DIAGNOSTICS are not drawn."""
    logged = {key for group in groups for run in group.runs for record in run.steps for key in record}
    return sorted(
        (key for key in logged if key.startswith("diagnostics/")), key=lambda key: ("estimator" not in key, key)
    )


def diagnostics(groups: Sequence[Group], looks: Looks) -> list[Figure]:
    """What the runs logged about their estimators and gradients, one figure each; the estimators' error first."""
    found = []
    for key in diagnostic_keys(groups)[:MOST_DIAGNOSTICS]:
        rows = _logged(groups, key)
        words = key.partition("/")[2].replace("_", " ")
        figure = panels(
            f"diagnostics_{key.partition('/')[2]}", f"{words} against samples seen, {MEANS}.",
            [{**row, "y": row["value"]} for row in rows], rows,
            panel="global_batch_size", line="title", label=words, looks=looks,
        )  # fmt: skip
        if figure:
            found.append(figure)
    return found


def _logged(groups: Sequence[Group], key: str) -> list[dict[str, Any]]:
    """A logged quantity by group and samples: means over seeds and over fortieths of the longest run."""
    longest = max((record["samples"] for group in groups for run in group.runs for record in run.steps), default=0)
    rows: list[dict[str, Any]] = []
    for group in groups:
        bins: dict[int, list[tuple[float, float]]] = {}
        for run in group.runs:
            for record in run.steps:
                if record.get(key) is not None:
                    place = math.ceil(BINS * record["samples"] / longest)
                    bins.setdefault(place, []).append((record["samples"], record[key]))
        rows += [
            {"title": group.title, "global_batch_size": group.global_batch_size,
             "samples": float(np.mean([at for at, _ in found])), "value": float(np.mean([value for _, value in found])),
             "records": len(found)}
            for _, found in sorted(bins.items())
        ]  # fmt: skip
    return rows


def panels(
    name: str, caption: str, rows: Sequence[dict[str, Any]], raw: Sequence[dict[str, Any]], *,
    panel: str, line: str, label: str, looks: Looks, by: str = "samples", log: bool = False,
) -> Figure | None:  # fmt: skip
    """Curves in small panels, up to three in a row; None without rows.

    Args:
        rows: what is drawn: `y`, and the columns that the arguments below name.
        raw: the records of the CSV.
        panel: the column that has a panel per value.
        line: the column that has a line per value, `title` or `global_batch_size`.
        label: of the y axis.
        by: the column on the x axis, `samples`, `epochs` or another.
        log: whether the y axis is logarithmic.
    """
    if not rows:
        return None
    plt = pyplot()
    places = list(dict.fromkeys(row[panel] for row in rows))
    places = sorted(places) if panel == "global_batch_size" else places
    lines = list(dict.fromkeys(row[line] for row in rows))
    across = min(3, len(places))
    down = -(-len(places) // across)
    shared = panel == "global_batch_size"
    figure, grid = plt.subplots(
        down, across, figsize=(WIDTH, 0.5 + 2.3 * down), squeeze=False, sharex=True, sharey=shared, layout="constrained"
    )
    few = len({row[by] for row in rows}) <= FEW_POINTS
    shades = plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(lines)))
    for place, value in enumerate(places):
        axes = grid[place // across][place % across]
        for at, which in enumerate(sorted(lines) if line == "global_batch_size" else lines):
            mine = [row for row in rows if row[panel] == value and row[line] == which]
            look = (
                {**looks(which), "marker": looks(which)["marker"] if few else None}
                if line == "title"
                else {"color": shades[at], "label": f"B = {which:,}"}
            )
            if mine:
                axes.plot([row[by] for row in mine], [row["y"] for row in mine], **look)
        if log:
            axes.set_yscale("log")
        axes.set_title(f"B = {value:,}" if panel == "global_batch_size" else value)
        axes.xaxis.set_major_locator(plt.MaxNLocator(5, steps=[1, 2, 5, 10]))
        if by == "samples":
            axes.xaxis.set_major_formatter(_thousands)
    for place in range(len(places), down * across):
        grid[place // across][place % across].set_visible(False)
        grid[place // across - 1][place % across].tick_params(labelbottom=True)
    figure.supxlabel("samples seen, thousands" if by == "samples" else by, fontsize=9)
    figure.supylabel(label, fontsize=9)
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    columns = columns_of_legend(list(handles))
    figure.legend(handles.values(), handles.keys(), loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=columns)
    return finish(name, caption, figure, raw)


def _thousands(value: float, _: int) -> str:
    return f"{value / 1000:g}"
