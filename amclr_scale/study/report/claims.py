"""Published claims and numbers (claims.yaml) beside what a study measured; where it measured nothing, that is said.

A study speaks to a claim when its finished cells hold what the claim's `measure` names; nothing else is inferred. What
it says is in the study's first metric, at this study's scale, and the table says how that scale differs.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

import yaml

from amclr_scale.data.names import known_as
from amclr_scale.metrics.scores import words_of
from amclr_scale.study.analysis.comparison import Comparison, Outcome, compare
from amclr_scale.study.analysis.groups import Group, baseline_of, called, nearest
from amclr_scale.study.analysis.results import Metric, Study
from amclr_scale.study.analysis.units import Unit
from amclr_scale.study.report import rank_scaling
from amclr_scale.study.report.document import Table
from amclr_scale.study.report.probe_figures import QUANTITIES, last
from amclr_scale.study.report.tables import DASH, mean_of

NOT_MEASURED = "not measured here"
SCORES = {key: words_of(key) for key in ("image_to_text_R@1", "text_to_image_R@1", "R@mean", "zero_shot_top1")}


def load_claims() -> dict[str, Any]:
    """The table of claims, numbers and sources."""
    found: dict[str, Any] = yaml.safe_load(files("amclr_scale.study.report").joinpath("claims.yaml").read_text("utf-8"))
    return found


class Speaker:
    """What one study says about claims.

    Args:
        against_reference: the decided comparisons with the study's reference.
    """

    def __init__(
        self,
        study: Study,
        outcome: Outcome,
        unit: Unit,
        against_reference: Sequence[Comparison],
        reference: Group | None,
    ):
        self.study, self.outcome, self.unit = study, outcome, unit
        self.against_reference, self.reference = against_reference, reference

    def says(self, claim: Mapping[str, Any]) -> str:
        """One line per thing measured; empty where the study is silent."""
        kinds: dict[str, Callable[[Mapping[str, Any]], list[str]]] = {
            "difference": self._differences,
            "reference": self._reference,
            "axis": self._axis,
            "cost": self._cost,
            "speed": self._speed,
            "weights": self._weights,
            "probe": self._probe,
            "ranks": self._ranks,
        }
        lines: list[str] = []
        for measure in measures_of(claim):
            if measure.get("held_equal", self.study.held_equal) == self.study.held_equal:
                lines += kinds[measure["kind"]](measure)
        return "\n".join(lines)

    def _pairs(self, measure: Mapping[str, Any]) -> list[tuple[Group, Group]]:
        """Groups of two arms at the same batch size, with the same optimizer and the same value of every axis."""
        pairs = []
        for first, second in measure["pairs"]:
            for group in called(self.outcome.groups, first):
                alike = [base for base in called(self.outcome.groups, second) if _optimizer(base) == _optimizer(group)]
                base = baseline_of(alike, alike[0].method, group) if alike else None
                if base is not None and base is not group:
                    pairs.append((group, base))
        return pairs

    def _differences(self, measure: Mapping[str, Any]) -> list[str]:
        compared = compare(self.outcome, self._pairs(measure), self.study.margin)  # one family: this claim's
        lines: dict[tuple[str, str], list[str]] = {}
        for one in compared:
            words = (
                f"{self.unit.change(one.difference.seeds)} at {one.group.global_batch_size:,} ({one.decision.verdict})"
            )
            lines.setdefault((one.group.title, one.base.title), []).append(words)
        return [f"{first} - {second}: " + "; ".join(words) for (first, second), words in lines.items()]

    def _reference(self, measure: Mapping[str, Any]) -> list[str]:
        lines: dict[str, list[str]] = {}
        asked = [group for arm in measure["arms"] for group in called(self.outcome.groups, arm)]
        for one in self.against_reference:
            if one.group in asked and one.group.global_batch_size < one.base.global_batch_size:
                words = f"{one.group.global_batch_size:,}: {one.decision.verdict}"
                lines.setdefault(one.group.title, []).append(f"{words} ({self.unit.change(one.difference.seeds)})")
        name = self.reference.name if self.reference else "the reference"
        return [f"{title} against {name}, at B = " + "; ".join(words) for title, words in lines.items()]

    def _axis(self, measure: Mapping[str, Any]) -> list[str]:
        axis, lines = measure["axis"], []
        for arm in measure["arms"]:
            members = [group for group in called(self.outcome.groups, arm) if axis in group.runs[0].config]
            for batch in sorted({group.global_batch_size for group in members}):
                here = [(group.runs[0].config[axis], group) for group in members if group.global_batch_size == batch]
                if len({str(value) for value, _ in here}) < 2:
                    continue
                means = [(value, mean) for value, group in here if (mean := self.outcome.mean(group))]
                scores = [f"{value}: {self.unit.estimate(mean.seeds)}" for value, mean in means]
                lines.append(f"{arm} at B = {batch:,}, by {axis}: " + "; ".join(scores))
        return lines

    def _cost(self, measure: Mapping[str, Any]) -> list[str]:
        batch = min(group.global_batch_size for group in self.outcome.groups)
        found = [called(self.outcome.groups, arm) for arm in measure["arms"]]
        first = [[group for group in members if group.method == members[0].method] for members in found]
        groups = [group for members in first if (group := nearest(members, batch, ()))]
        groups = [group for group in groups if group.runs[0].cell.comparisons is not None]
        if len({group.runs[0].cell.comparisons for group in groups}) < 2:
            return []
        lines = []
        for group in groups:
            cell = group.runs[0].cell
            negatives = "" if cell.negatives is None else f"{cell.negatives:,.0f} negatives per term, "
            passes = "" if cell.encoder_cost is None else f", {cell.encoder_cost:g} encoder passes"
            lines.append(f"{group.name}: {negatives}{cell.comparisons:,.0f} comparisons per anchor{passes}")
        return lines

    def _speed(self, measure: Mapping[str, Any]) -> list[str]:
        lines = []
        for group, base in self._pairs(measure):
            first, second = mean_of(group.runs, "samples_per_second"), mean_of(base.runs, "samples_per_second")
            if first and second:
                lines.append(f"{group.name}: {first / second:.2f} times the samples/s of {base.title}")
        return lines

    def _probe(self, measure: Mapping[str, Any]) -> list[str]:
        [quantity] = [one for one in QUANTITIES if one.key == measure["quantity"]]
        asked = [group for arm in measure["arms"] for group in called(self.outcome.groups, arm)]
        known = [(group, one) for group in asked if (one := last(group, quantity))]
        if len({group.title for group, _ in known}) < 2:
            return []
        found: dict[str, list[str]] = {}
        for group, one in known:
            words = f"{group.global_batch_size:,}: {format(one.value, quantity.digits)}"
            found.setdefault(group.title, []).append(words)
        return [
            f"{quantity.words}, by B: " + "; ".join(f"{title} ({', '.join(said)})" for title, said in found.items())
        ]

    def _ranks(self, measure: Mapping[str, Any]) -> list[str]:
        return rank_scaling.sentences(rank_scaling.points(self.outcome.groups), measure["arms"])

    def _weights(self, _: Mapping[str, Any]) -> list[str]:
        found = {describe_towers(run.config)[1] for run in self.study.runs}
        return [f"towers here: {', '.join(sorted(found))}"] if found else []


def measures_of(claim: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a study must hold to speak to a claim: nothing, one thing, or any of several."""
    measure = claim.get("measure") or []
    return list(measure) if isinstance(measure, list) else [measure]


def sources_list() -> str:
    """Where the claims come from, as Markdown."""
    return "\n".join(f"- {name}: {words}" for name, words in load_claims()["sources"].items())


def describe_towers(config: Mapping[str, Any]) -> tuple[str, str]:
    """The towers' names, and what they were initialised with."""
    names = f"{config.get('model.image.name')} and {config.get('model.text.name')}"
    weights = [
        "image tower from a file" if config.get("model.image.weights") else "",
        "text tower pretrained" if config.get("model.text.pretrained") else "",
    ]
    return names, ", ".join(word for word in weights if word) or "random weights"


def scale_of(study: Study) -> str:
    """This study's scale, in one line."""
    if not study.runs:
        return "no finished cell"
    run = study.runs[0]
    names, weights = describe_towers(run.config)
    samples = sorted({one.cell.samples for one in study.runs})
    batches = sorted({one.cell.global_batch_size for one in study.runs})
    length = f"{samples[0]:,}" if len(samples) == 1 else f"{samples[0]:,} to {samples[-1]:,}"
    sizes = ", ".join(f"{batch:,}" for batch in batches)
    seeds = len({one.cell.seed for one in study.runs})
    return (
        f"{', '.join(known_as(run.config.get('data.train', '')))}, {names} ({weights}), {length} samples, B = {sizes}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}"
    )


def claims_table(speaker: Speaker) -> Table:
    """Every claim: what was claimed, what this study says, and why that is comparable or not."""
    found = load_claims()
    rows, raw = [], []
    for claim in found["claims"]:
        says = speaker.says(claim)
        elsewhere = str(claim.get("elsewhere", ""))
        here = says or NOT_MEASURED + (f": {elsewhere}" if elsewhere else "")
        comparable = str(claim.get("comparable", "its direction, not its size: another scale")) if says else DASH
        rows.append([
            claim["id"], claim["claim"] + (f"\nclaimed: {claim['claimed']}" if "claimed" in claim else ""),
            f"{claim['source']}: {claim['scale']}", claim["doubt"], here, comparable,
        ])  # fmt: skip
        raw.append({
            "id": claim["id"], "claim": claim["claim"], "claimed": claim.get("claimed"),
            "source": claim["source"], "scale": claim["scale"], "doubt": claim["doubt"],
            "measured_here": says or None, "elsewhere": elsewhere or None,
        })  # fmt: skip
    header = ["", "claim", "source and scale", "why it needs a test", "measured here", "comparable"]
    return Table("claims", header, rows, raw, left=6)


def numbers_table(study: Study, groups: Sequence[Group]) -> Table:
    """Published scores, and below each the same arm's here, at the batch size nearest to theirs."""
    found = load_claims()
    split = study.metrics[0].keys[0].rpartition("/")[0]
    rows, raw = [], []
    for number in found["numbers"]:
        group, where = _counterpart(number, groups), ""
        record = {"published": number["name"], "source": number["source"], "scale": number["scale"]}
        cells = []
        for key in SCORES:
            claimed = number["scores"].get(key)
            measured = _measured(Metric(key, (f"{split}/{key}",)), group) if group and claimed is not None else None
            record |= {f"claimed_{key}": claimed, f"here_{key}": None if measured is None else 100 * measured}
            cells.append(DASH if claimed is None else f"{claimed:.2f}")
            if group and measured is not None:
                cells[-1] += f"\nhere {100 * measured:.2f}"
                where = f"{group.name}, {split}"
        rows.append([number["name"], number["source"], *cells, where or NOT_MEASURED])
        raw.append({**record, "here": where or None})
    header = ["arm", "source", *(f"{words}, %" for words in SCORES.values()), "here"]
    return Table("published_numbers", header, rows, raw, left=2, words=(2 + len(SCORES),))


def scales_list() -> str:
    """What the published numbers were measured on, as Markdown."""
    scales = dict.fromkeys((number["source"], number["scale"]) for number in load_claims()["numbers"])
    return "\n".join(f"- {source}: {scale}" for source, scale in scales)


def _counterpart(number: Mapping[str, Any], groups: Sequence[Group]) -> Group | None:
    fitting = [group for group in called(groups, number["arm"]) if _optimizer(group) == number["optimizer"]]
    fitting = fitting or [g for g in groups if g.kind == number["arm"] and _optimizer(g) == number["optimizer"]]
    plain = [group for group in fitting if not group.variant] or fitting
    return min(plain, key=lambda group: abs(math.log(group.global_batch_size / number["batch"])), default=None)


def _optimizer(group: Group) -> Any:
    return group.runs[0].config.get("optimizer.name")


def _measured(metric: Metric, group: Group) -> float | None:
    """The mean over seeds (at the swept rate that is best in this metric)."""
    if any(key not in run.results for run in group.runs for key in metric.keys):
        return None
    runs, _ = group.chosen(metric)
    scores = [metric.score(run.results) for run in runs.values()]
    return sum(scores) / len(scores) if scores else None
