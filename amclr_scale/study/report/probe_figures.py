"""How near a batch comes to the whole data set, from what runs with `run.probe` logged: figures and a table.

On a fixed set of K training samples, now and then during training: the stored averages u against the means g over the
set's negatives that they estimate, and the gradient of batches of B against that of all K samples as one batch
(objectives/whole_set.py has the definitions). Means over seeds with Student's t intervals; nothing is binned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amclr_scale.study.analysis.groups import Group
from amclr_scale.study.analysis.results import Run
from amclr_scale.study.analysis.units import columns_of, words_of
from amclr_scale.study.report.curves import panels
from amclr_scale.study.report.document import Figure, Table
from amclr_scale.study.report.plots import WIDTH, Looks, batch_axis, finish, legend, pyplot
from amclr_scale.study.statistics.decisions import Estimate, estimate

PREFIX = "probe/"


@dataclass(frozen=True)
class Quantity:
    """One logged number of the probe.

    Attributes:
        key: in metrics.jsonl, behind `probe/`.
        words: on an axis.
        short: in the head of a table.
        digits: format of its values.
        ideal: its value where a batch is as good as the whole set.
    """

    key: str
    words: str
    short: str
    digits: str = ".3g"
    ideal: float = 1.0


ERROR = Quantity("estimator_error", "relative error of u, median over samples", "error of u, median", ideal=0.0)
ERROR_P90 = Quantity("estimator_error_p90", "relative error of u, 90th percentile", "90th percentile", ideal=0.0)
LOG_RATIO = Quantity("estimator_log_ratio", "log(u / g), mean over samples", "mean log(u / g)", ideal=0.0)
VISITED = Quantity("estimator_visited", "share of samples that were visited", "visited")
COSINE = Quantity("gradient_cosine", "cosine with the whole set's gradient", "cosine", ".4f")
NORM = Quantity("gradient_norm_ratio", "norm over the whole set's", "norm ratio", ".3f")
EXPECTED_COSINE = Quantity("expected_gradient_cosine", "cosine, expected gradient", "cosine, expected", ".4f")
EXPECTED_NORM = Quantity(
    "expected_gradient_norm_ratio", "norm over the whole set's, expected gradient", "norm ratio, expected", ".3f"
)
BIAS = Quantity("gradient_bias", "bias over the whole set's norm", "bias", ".3f", ideal=0.0)
NOISE = Quantity("gradient_noise", "deviation of one estimate over the whole set's norm", "noise", ".3f", ideal=0.0)
LAYER_COSINE = Quantity("layer_gradient_cosine", "cosine, last layer's parameters", "cosine, last layer", ".4f")
LAYER_EXPECTED_COSINE = Quantity(
    "layer_expected_gradient_cosine", "cosine, expected, last layer's parameters", "expected, last layer", ".4f"
)
DRIFT_IMAGE, DRIFT_TEXT = (
    Quantity(f"drift_{side}", f"squared movement of {side} embeddings", f"drift, {side}", ideal=0.0)
    for side in ("image", "text")
)  # since the measurement before
QUANTITIES = (
    ERROR, ERROR_P90, LOG_RATIO, VISITED, COSINE, NORM, EXPECTED_COSINE, EXPECTED_NORM, BIAS, NOISE,
    LAYER_COSINE, LAYER_EXPECTED_COSINE, DRIFT_IMAGE, DRIFT_TEXT,
)  # fmt: skip
TENTHS = tuple(
    Quantity(f"estimator_error_age_{k}", f"error, {k} of ten by age", f"age {k}", ideal=0.0) for k in range(1, 11)
)  # of the samples: those visited last, to those visited longest ago
BY_BATCH = ((COSINE, NORM), (EXPECTED_COSINE, EXPECTED_NORM))
WIDE_RANGE = 20.0  # largest over smallest value from which an axis is logarithmic


def probed(groups: Sequence[Group]) -> list[Group]:
    """The groups with a run that logged the probe."""
    return [group for group in groups if any(run.probes for run in group.runs)]


def probe_sizes(groups: Sequence[Group]) -> list[int]:
    """K: samples of the probe."""
    sizes = {run.config.get("run.probe.samples") for group in groups for run in group.runs if run.probes}
    return sorted(int(size) for size in sizes if size)


def last(group: Group, quantity: Quantity) -> Estimate | None:
    """The last logged value, over seeds; None where no run has one."""
    values = [value for run in group.runs if (value := _last(run, quantity)) is not None]
    return estimate(values) if values else None


def _last(run: Run, quantity: Quantity) -> float | None:
    found = [value for record in run.probes if (value := record.get(f"{PREFIX}{quantity.key}")) is not None]
    return float(found[-1]) if found else None


def curve(groups: Sequence[Group], looks: Looks, quantity: Quantity) -> Figure | None:
    """A quantity against epochs, a panel per batch size, a line per method; None where nobody logged it."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        at: dict[float, list[float]] = {}
        for run in group.runs:
            for record in run.probes:
                if (value := record.get(f"{PREFIX}{quantity.key}")) is not None:
                    at.setdefault(float(record["samples"]), []).append(float(value))
        cell = group.runs[0].cell
        rows += [
            {"title": group.title, "global_batch_size": group.global_batch_size, "samples": samples,
             "epochs": samples * cell.epochs / cell.samples, "seeds": len(values),
             **columns_of(quantity.key, estimate(values))}
            for samples, values in sorted(at.items())
        ]  # fmt: skip
    values = [row[quantity.key] for row in rows]
    wide = bool(values) and min(values) > 0 and max(values) > WIDE_RANGE * min(values)
    return panels(
        f"probe_{quantity.key}",
        f"{quantity.words[0].upper()}{quantity.words[1:]}, on the probe set, against epochs; mean over seeds.",
        [{**row, "y": row[quantity.key]} for row in rows],
        rows,
        panel="global_batch_size",
        line="title",
        label=quantity.words,
        looks=looks,
        by="epochs",
        log=wide,
    )


def by_age(groups: Sequence[Group], looks: Looks) -> Figure | None:
    """The last error of averages by the age of a sample's last visit; None where nobody logged it."""
    rows: list[dict[str, Any]] = []
    for group in groups:
        for number, quantity in enumerate(TENTHS, 1):
            if one := last(group, quantity):
                rows.append(
                    {"title": group.title, "global_batch_size": group.global_batch_size, "age": number,
                     **columns_of(ERROR.key, one)}
                )  # fmt: skip
    return panels(
        "probe_error_by_age",
        "Relative error of u at the end, median over samples, by the age of the last visit in tenths of the samples: 1 "
        "was visited last, 10 longest ago; mean over seeds.",
        [{**row, "y": row[ERROR.key]} for row in rows], rows,
        panel="global_batch_size", line="title", label=ERROR.words, looks=looks, by="age",
    )  # fmt: skip


def by_batch(groups: Sequence[Group], looks: Looks) -> Figure | None:
    """The last gradient of every run against the whole set's, by batch size: one estimate's, and the expected one's."""
    shown = [pair for pair in BY_BATCH if any(last(group, quantity) for group in groups for quantity in pair)]
    if not shown:
        return None
    plt = pyplot()
    figure, grid = plt.subplots(
        len(shown), 2, figsize=(WIDTH, 0.6 + 2.7 * len(shown)), squeeze=False, sharex=True, layout="constrained"
    )
    titles = list(dict.fromkeys(group.title for group in groups))
    raw: dict[str, dict[str, Any]] = {
        group.name: {"title": group.title, "global_batch_size": group.global_batch_size, "seeds": len(group.runs)}
        for group in groups
    }
    cut = False
    for axes, quantity in zip(grid.flat, [quantity for pair in shown for quantity in pair], strict=True):
        axes.axhline(quantity.ideal, color="0.5", linewidth=0.8, linestyle=(0, (1, 1.5)))
        for place, title in enumerate(titles):
            members = sorted((g for g in groups if g.title == title), key=lambda g: g.global_batch_size)
            known = [(group, one) for group in members if (one := last(group, quantity))]
            shift = 2 ** (0.045 * (place - (len(titles) - 1) / 2))  # side by side, not one over another
            halves = [one.interval()[1] - one.value if one.n > 1 else 0.0 for _, one in known]
            places = [group.global_batch_size * shift for group, _ in known]
            axes.errorbar(
                places, [one.value for _, one in known], halves, elinewidth=0.9, capsize=2, **looks(title)
            )  # fmt: skip
            for group, one in known:
                raw[group.name] |= columns_of(quantity.key, one)
        batch_axis(axes, groups)
        axes.set_title(quantity.words)
        cut |= show_means(axes, [quantity.ideal, *(one.value for group in groups if (one := last(group, quantity)))])
    for axes in grid[:-1].flat:
        axes.set_xlabel("")
    legend(figure, grid[0][0], columns=4)
    caption = (
        "How near the gradient of small batches is to that of the whole probe set, at the end of training; 1 is the "
        "same. Bars: 95 % t intervals over seeds."
    )
    caption += " Bars that are longer than the picture end at its edge; report.json has them whole." if cut else ""
    return finish("probe_gradient_by_batch", caption, figure, list(raw.values()))


def show_means(axes: Any, values: Sequence[float]) -> bool:
    """Keep the means apart where intervals, as those of two seeds are, reach far beyond them; whether any is cut."""
    (low, high), (least, most) = axes.get_ylim(), (min(values), max(values))
    room = most - least or 1.0
    axes.set_ylim(max(low, least - room), min(high, most + room))
    return bool(low < least - room or high > most + room)


def last_table(groups: Sequence[Group]) -> Table:
    """The last values of every quantity that was logged."""
    shown = [quantity for quantity in QUANTITIES if any(last(group, quantity) for group in groups)]
    rows, raw = [], []
    for group in groups:
        found: Mapping[str, Estimate | None] = {quantity.key: last(group, quantity) for quantity in shown}
        seeds = max((one.n for one in found.values() if one), default=0)
        epochs = max(run.probes[-1]["samples"] for run in group.runs if run.probes)
        epochs *= group.runs[0].cell.epochs / group.runs[0].cell.samples
        rows.append([
            group.title, f"{group.global_batch_size:,}", str(seeds), f"{epochs:.3g}",
            *(words_of(found[quantity.key], quantity.digits) for quantity in shown),
        ])  # fmt: skip
        record = {"arm": group.arm, "title": group.title, "global_batch_size": group.global_batch_size}
        raw.append({**record, "seeds": seeds, "epochs": epochs})
        for quantity in shown:
            raw[-1] |= columns_of(quantity.key, found[quantity.key])
    header = ["arm", "B", "seeds", "epochs", *(quantity.short for quantity in shown)]
    return Table("probe_last", header, rows, raw)
