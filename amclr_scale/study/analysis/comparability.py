"""What is equal over a study's runs, what differs, and by what: read from the runs themselves, not from the plan.

Every key of the recipe that has more than one value over the finished runs is listed with what explains it: the seed,
the batch size, the arm, an axis, or several of them together. A key of the towers, the data or the evaluation that
differs between arms makes them incomparable unless the difference is the arm; it is pointed out.
"""

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from amclr_scale.config.load import LATER, NEUTRAL, build
from amclr_scale.config.load import RECIPE as SECTIONS
from amclr_scale.study.analysis.reading import flatten
from amclr_scale.study.analysis.results import Run

RECIPE = tuple(name if name == "seed" else f"{name}." for name in SECTIONS)
# What no arm may change without a reader being told: what is learned from, what learns, and what is measured.
EXPECTED_EQUAL = (
    "data.train", "data.weights", "data.caption", "data.tokenizer", "data.context_length", "data.image_size",
    "model.", "optimizer.", "evaluation.", "objective.temperature",
)  # fmt: skip
ABSENT = "(absent)"
ENVIRONMENT = ("device", "cpu", "host", "ranks", "commit", "packages")


@dataclass(frozen=True)
class Difference:
    """A key that does not have one value.

    Attributes:
        by: what explains it: seed, batch size, arm, an axis, several of them, or nothing.
        values: a few of them, each with where it stands.
        warn: it makes arms differ in what they should share.
    """

    key: str
    by: str
    values: tuple[tuple[str, str], ...]
    warn: bool


def differences(runs: Sequence[Run]) -> list[Difference]:
    """All keys of the recipe with more than one value, explained."""
    configs = [_folded(config, _optional(runs)) for config in _said(runs)]
    keys = dict.fromkeys(key for config in configs for key in config if key.startswith(RECIPE) and key not in NEUTRAL)
    found = []
    for key in keys:
        values = [_text(config.get(key, ABSENT)) for config in configs]
        options = key.startswith("objective.")  # one objective's options are absent from another's
        if len(set(values) - ({ABSENT} if options else set())) > 1:
            found.append(_explain(key, runs, values))
    return found


def _said(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Configurations with every key that the youngest has: one that an older version did not have, at its default."""
    defaults = flatten(build({"train": {"epochs": 1}}).model_dump(mode="json")) | LATER
    known: dict[str, set[str]] = {}
    for run in runs:
        known.setdefault(str(run.config.get("objective.name")), set()).update(run.config)
    anywhere = set().union(*known.values())
    found = []
    for run in runs:
        sections = {key.rpartition(".")[0] for key in run.config}
        had = known[str(run.config.get("objective.name"))]
        new = (
            key
            for key in sorted(anywhere - run.config.keys() - sections)
            if key in defaults
            and key.rpartition(".")[0] in sections
            and (key in had or not key.startswith("objective."))
        )
        found.append({**run.config, **{key: defaults[key] for key in new}})
    return found


def _optional(runs: Sequence[Run]) -> set[str]:
    """Sections that are null in some run."""
    return {key for run in runs for key, value in run.config.items() if value is None}


def _folded(config: Mapping[str, Any], sections: set[str]) -> dict[str, Any]:
    """A configuration in which the keys of a section that others leave out are one value."""
    folded: dict[str, Any] = {}
    for key, value in config.items():
        parent = next((section for section in sections if key.startswith(f"{section}.")), None)
        if parent is None:
            folded[key] = value
        else:
            folded.setdefault(parent, {})[key.removeprefix(f"{parent}.")] = value
    return folded


def _explain(key: str, runs: Sequence[Run], values: list[str]) -> Difference:
    axes = dict.fromkeys(axis for run in runs for axis in run.cell.axes)
    explanations: dict[str, Callable[[Run], Hashable]] = {
        "seed": lambda run: run.cell.seed,
        "batch size": lambda run: run.cell.global_batch_size,
        "arm": lambda run: run.cell.arm,
        **{f"axis {axis}": _axis(axis) for axis in axes},
        "arm and batch size": lambda run: (run.cell.arm, run.cell.global_batch_size),
        "arm and seed": lambda run: (run.cell.arm, run.cell.seed),
        "arm and axes": lambda run: (run.cell.arm, run.cell.variant, run.cell.lr),
        "arm, batch size and axes": lambda run: (
            run.cell.arm, run.cell.global_batch_size, run.cell.variant, run.cell.lr,
        ),
    }  # fmt: skip
    placed = {name: [of(run) for run in runs] for name, of in explanations.items()}
    by = next((name for name, at in placed.items() if _explains(at, values)), "nothing")
    places: dict[str, list[str]] = {}
    for place, value in zip(placed.get(by, [run.cell.cell for run in runs]), values, strict=True):
        words = ", ".join(str(one) for one in place if one != ()) if isinstance(place, tuple) else str(place)
        if words not in places.setdefault(value, []):
            places[value].append(words)
    shown = tuple(
        (", ".join(where[:8]) + (", ..." if len(where) > 8 else ""), value) for value, where in places.items()
    )
    among_arms = by not in {"seed", "batch size"} and not by.startswith("axis ")
    return Difference(key, by, shown, among_arms and key.startswith(EXPECTED_EQUAL))


def _axis(name: str) -> Callable[[Run], Hashable]:
    return lambda run: _text(run.cell.axes.get(name))


def _explains(places: Sequence[Hashable], values: Sequence[str]) -> bool:
    """Whether the value is a function of the place."""
    at: dict[Hashable, str] = {}
    return all(at.setdefault(place, value) == value for place, value in zip(places, values, strict=True))


def surroundings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The values of what a run was done with: device, host, commit, packages."""
    found: dict[str, list[str]] = {}
    for key in ENVIRONMENT:
        values: dict[str, None] = {}
        for run in runs:
            for one in (run.environment, *run.environment.get("resumed", [])):
                if key in one:
                    values[_text(one[key])] = None
        found[key] = list(values)
    return found


def uneven_rate(groups: Iterable[Sequence[Run]]) -> float:
    """The largest ratio of samples per second between runs that differ in the seed alone; 1 where there are none."""
    ratios = [1.0]
    for runs in groups:
        rates = [rate for run in runs if (rate := run.samples_per_second)]
        if rates:
            ratios.append(max(rates) / min(rates))
    return max(ratios)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
