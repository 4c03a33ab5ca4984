"""What a study measured: cells that finished, with all that their runs say, and cells that did not, with the reason.

Nothing is guessed: what a file does not say is None. reading.py reads them from a study's folder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr_scale.config.objective_options import Declared, declared
from amclr_scale.errors import UserError
from amclr_scale.evaluation.numbers import Number, mean_of
from amclr_scale.metrics.scores import lower_is_better
from amclr_scale.study.planning.plan import SWEPT, Role

Axes = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Metric:
    """An outcome: one result of evaluation.json, or the mean of several."""

    name: str
    keys: tuple[str, ...]

    @property
    def lower_is_better(self) -> bool:
        return all(map(lower_is_better, self.keys))

    @property
    def splits(self) -> set[str]:
        """What it is measured on."""
        return {key.rpartition("/")[0] for key in self.keys}

    def score(self, results: Mapping[str, float]) -> float:
        return sum(results[key] for key in self.keys) / len(self.keys)

    def number(self, items: Mapping[str, Number]) -> Number | None:
        """The same with its items; None where they were not kept, or several splits have no one set to draw from."""
        if len(self.splits) > 1:
            return None
        found = [items[key] for key in self.keys if key in items]
        return mean_of(*found) if len(found) == len(self.keys) else None

    def chance(self, results: Mapping[str, float]) -> float | None:
        found = [results[f"{key}/chance"] for key in self.keys if f"{key}/chance" in results]
        return sum(found) / len(found) if len(found) == len(self.keys) else None


@dataclass(frozen=True)
class Cell:
    """One line of the plan; the fields of cells.json.

    Attributes:
        role: whether it is scored, or chooses a learning rate.
        waits: its learning rate is not chosen yet.
    """

    cell: str
    arm: str
    label: str
    global_batch_size: int
    seed: int
    recipe_hash: str
    samples: int
    steps: int
    epochs: float
    lr: float | None
    axes: Mapping[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()
    encoder_cost: float | None = None
    negatives: float | None = None
    comparisons: float | None = None
    flops: float | None = None
    role: Role = "scored"
    waits: bool = False

    @property
    def rate(self) -> float:
        """The learning rate, as the axis has it where there is one; nan where it is not chosen yet."""
        value = self.axes.get(SWEPT, self.lr)
        return math.nan if value is None else float(value)

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
        items: what was measured per item, of the outcomes; empty where it was not kept, and of cells that tune.
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
    def objective(self) -> Declared | None:
        """What its objective declares; None where this version has no such objective."""
        section = {k.removeprefix("objective."): v for k, v in self.config.items() if k.startswith("objective.")}
        try:
            return declared(section)
        except UserError:
            return None

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
    """All of it.

    Attributes:
        runs: those that are scored.
        missing: cells of either role.
        tuning: runs that choose learning rates.
        criterion: what they choose by; None where there are no such cells.
    """

    folder: Path
    plan: Mapping[str, Any]
    name: str
    held_equal: str
    metrics: tuple[Metric, ...]
    margin: float
    reference: Mapping[str, Any]
    runs: tuple[Run, ...]
    missing: tuple[Missing, ...]
    tuning: tuple[Run, ...] = ()
    criterion: Metric | None = None

    @property
    def cells(self) -> list[Cell]:
        """Those that are scored, finished or not."""
        return [run.cell for run in self.runs] + [one.cell for one in self.missing if one.cell.role == "scored"]

    @property
    def tuning_cells(self) -> list[Cell]:
        """Those that choose learning rates, finished or not."""
        return [run.cell for run in self.tuning] + [one.cell for one in self.missing if one.cell.role == "tuning"]


def _hashable(value: Any) -> Any:
    return tuple(_hashable(one) for one in value) if isinstance(value, list) else value
