"""A study's folder, read: what finished with all it measured, and what did not with the reason.

The folder is the one `launch/study.py` makes:

    study.yaml           the plan, all defaults written out
    cells.json           metrics, margin, reference, and every cell: arm, batch size, seed, recipe hash, cost
    runs/CELL/           run folders of launch/train.py
    attempts.jsonl       one line per attempt at a cell
    logs/CELL.log        its console

A cell counts as finished when its run has an evaluation.json and config.yaml begins with the cell's recipe hash.
Nothing is guessed: what a file does not say is None.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.errors import UserError
from amclr_scale.evaluation.items import FILE as ITEMS
from amclr_scale.evaluation.items import load_items
from amclr_scale.evaluation.numbers import Number, mean_of

Axes = tuple[tuple[str, Any], ...]
SWEPT = "optimizer.lr"  # an axis to choose from, not to compare


@dataclass(frozen=True)
class Metric:
    """An outcome: one result of evaluation.json, or the mean of several over the same items."""

    name: str
    keys: tuple[str, ...]

    @property
    def lower_is_better(self) -> bool:
        return all(key.endswith("median_rank") for key in self.keys)

    def score(self, results: Mapping[str, float]) -> float:
        return sum(results[key] for key in self.keys) / len(self.keys)

    def number(self, items: Mapping[str, Number]) -> Number | None:
        """The same with its items; None where they were not kept."""
        found = [items[key] for key in self.keys if key in items]
        return mean_of(*found) if len(found) == len(self.keys) else None

    def chance(self, results: Mapping[str, float]) -> float | None:
        found = [results[f"{key}/chance"] for key in self.keys if f"{key}/chance" in results]
        return sum(found) / len(found) if len(found) == len(self.keys) else None


@dataclass(frozen=True)
class Cell:
    """One line of the plan; the fields of cells.json."""

    cell: str
    arm: str
    label: str
    global_batch_size: int
    seed: int
    recipe_hash: str
    samples: int
    steps: int
    epochs: float
    lr: float
    axes: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    encoder_cost: float | None = None
    negatives: float | None = None
    comparisons: float | None = None
    flops: float | None = None

    @property
    def variant(self) -> Axes:
        """The axes that make it another method, the swept one left out."""
        return tuple((key, _hashable(value)) for key, value in self.axes.items() if key != SWEPT)

    @property
    def title(self) -> str:
        """The arm's label, with its axes."""
        return titled(self.label, self.variant)


def titled(label: str, variant: Axes) -> str:
    """An arm's label with the values of axes."""
    details = ", ".join(f"{key.rpartition('.')[2]} {value}".replace("_", " ") for key, value in variant)
    return f"{label}, {details}" if details else label


@dataclass(frozen=True)
class Run:
    """A finished cell.

    Attributes:
        results: evaluation.json.
        items: what was measured per item; empty where it was not kept.
        records: metrics.jsonl.
        config: the resolved configuration, flat: {"model.image.name": ...}.
        attempted_seconds: wall clock of all attempts at it; None where none is recorded.
    """

    cell: Cell
    results: Mapping[str, float]
    items: Mapping[str, Number]
    records: tuple[Mapping[str, Any], ...]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    attempted_seconds: float | None

    @property
    def steps(self) -> list[Mapping[str, Any]]:
        """The training records."""
        return [record for record in self.records if "samples_per_second" in record]

    @property
    def probes(self) -> list[Mapping[str, Any]]:
        """The records of `run.probe`; none where it was off."""
        return [record for record in self.records if any(key.startswith("probe/") for key in record)]

    @property
    def training_seconds(self) -> float | None:
        """Seconds of the logged steps: no start, no evaluation."""
        return sum(seconds for _, seconds in self._stretches()) or None

    @property
    def samples_per_second(self) -> float | None:
        """Over all steps but the first logged ones, which hold the start."""
        later = self._stretches()[1:] or self._stretches()
        seconds = sum(seconds for _, seconds in later)
        return sum(samples for samples, _ in later) / seconds if seconds else None

    def _stretches(self) -> list[tuple[float, float]]:
        """Samples and seconds between logged steps."""
        found, before = [], 0.0
        for record in self.steps:
            samples = record["samples"] - before
            before = record["samples"]
            if record["samples_per_second"]:
                found.append((samples, samples / record["samples_per_second"]))
        return found

    @property
    def optimizer_steps(self) -> float:
        return self.cell.steps

    @property
    def hours(self) -> float | None:
        """Wall clock of all attempts, start and evaluation included; else of the logged steps."""
        seconds = self.attempted_seconds or self.training_seconds
        return None if seconds is None else seconds / 3600

    @property
    def peak_gib(self) -> float | None:
        """Peak memory per rank."""
        return max((record["peak_memory_gib"] for record in self.steps if "peak_memory_gib" in record), default=None)

    @property
    def useful_flops(self) -> float | None:
        """Both towers, forward and backward once, for all samples; counted by running the towers, not estimated."""
        if not self.steps or not self.steps[-1].get("samples_per_second_per_rank"):
            return None
        last = self.steps[-1]
        per_sample = float(last["useful_tflops_per_rank"]) * 1e12 / float(last["samples_per_second_per_rank"])
        return per_sample * self.cell.samples


@dataclass(frozen=True)
class Missing:
    """A cell without a result: failed, interrupted, stale (of another recipe), unmeasured, unreadable or not run."""

    cell: Cell
    status: str
    message: str


@dataclass(frozen=True)
class Study:
    """All of it."""

    folder: Path
    plan: Mapping[str, Any]
    name: str
    held_equal: str
    metrics: tuple[Metric, ...]
    margin: float
    reference: Mapping[str, Any]
    runs: tuple[Run, ...]
    missing: tuple[Missing, ...]

    @property
    def cells(self) -> list[Cell]:
        return [run.cell for run in self.runs] + [one.cell for one in self.missing]


def read_study(folder: Path) -> Study:
    """Read a study's folder, finished or not.

    Raises:
        UserError: it is none, or a file of it cannot be read.
    """
    listed = _json(folder / "cells.json")
    try:
        plan = yaml.safe_load((folder / "study.yaml").read_text("utf-8")) or {}
        cells = [_cell(entry) for entry in listed["cells"]]
        metrics = tuple(_metric(entry) for entry in listed["metrics"])
        margin, reference = float(listed["margin"]), dict(listed.get("reference") or {})
        name, held_equal = str(listed["plan"]), str(listed["held_equal"])
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'study.yaml'}: expected the plan of a study, got: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'cells.json'}: expected the cells of a study as launch/study.py writes them, got: "
            f"{type(error).__name__} {error}"
        ) from error
    attempts = _attempts(folder / "attempts.jsonl")
    runs: list[Run] = []
    missing: list[Missing] = []
    found: Run | Missing
    for cell in cells:
        try:
            found = _read_run(folder / "runs" / cell.cell, cell, metrics, attempts.get(cell.cell, []))
        except (OSError, ValueError, yaml.YAMLError) as error:  # damaged, or being written just now
            found = Missing(cell, "unreadable", str(error))
        if isinstance(found, Run):
            runs.append(found)
        else:
            missing.append(found)
    return Study(folder, plan, name, held_equal, metrics, margin, reference, tuple(runs), tuple(missing))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a file that launch/study.py wrote, got: {error}") from error


def _cell(entry: Mapping[str, Any]) -> Cell:
    known = {name: entry[name] for name in Cell.__dataclass_fields__ if name in entry}
    return Cell(**{**known, "words": tuple(entry.get("words", ())), "axes": dict(entry.get("axes") or {})})


def _metric(entry: Any) -> Metric:
    """`split/name`, or {"name": ..., "keys": [...]} for the mean of several."""
    if isinstance(entry, str):
        return Metric(entry, (entry,))
    return Metric(str(entry["name"]), tuple(entry["keys"]))


def _attempts(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Attempts by cell, in order. A line that was cut off by a kill is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    lines = path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        try:
            attempt = json.loads(line)
            found.setdefault(attempt["cell"], []).append(attempt)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _read_run(folder: Path, cell: Cell, metrics: tuple[Metric, ...], attempts: list[dict[str, Any]]) -> Run | Missing:
    last = attempts[-1] if attempts else {}
    if not (folder / "evaluation.json").exists():
        status = str(last.get("status", "not run"))
        message = str(last.get("message") or "")
        if status == "done":
            status, message = "failed", "its last attempt ended well, but there is no evaluation.json"
        return Missing(cell, status, message)
    text = (folder / "config.yaml").read_text("utf-8")
    first = text.partition("\n")[0].removeprefix("# recipe").strip()
    if first != cell.recipe_hash:
        return Missing(
            cell, "stale", f"the run in {folder.name} is of recipe {first}, the plan's is {cell.recipe_hash}"
        )
    results = {key: value for key, value in _json(folder / "evaluation.json").items() if value is not None}
    absent = [key for metric in metrics for key in metric.keys if key not in results]
    if absent:
        return Missing(cell, "unmeasured", f"evaluation.json has no {', '.join(absent)}")
    seconds = [float(attempt["seconds"]) for attempt in attempts if attempt.get("seconds") is not None]
    environment = folder / "environment.json"
    return Run(
        cell=cell,
        results=results,
        items=load_items(folder / ITEMS) if (folder / ITEMS).exists() else {},
        records=tuple(_records(folder / "metrics.jsonl")),
        config=flatten(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))),
        environment=_json(environment) if environment.exists() else {},
        attempted_seconds=sum(seconds) if seconds else None,
    )


def _records(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _hashable(value: Any) -> Any:
    return tuple(_hashable(one) for one in value) if isinstance(value, list) else value
