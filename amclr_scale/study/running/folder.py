"""A study's folder: what is written before the first cell, what was tried, and which cells are finished.

    study.yaml       the plan, all defaults written out
    config.yaml      the configuration that all arms share, as it was when the study began
    cells.json       metrics, margin, reference, and every cell with its recipe hash
    attempts.jsonl   one line per attempt at a cell
    running.json     the cells that run now and since when; what a killed study left there is an attempt too
    rates.json       samples per second by setting, from a pilot (held_equal wall_clock)
    logs/CELL.log    its console; CELL.attempts.jsonl: what a job array's task tried
    runs/CELL/       its run folder

Cells run from config.yaml, not from the file that the plan names: editing that file changes nothing half-way. Imports
no torch.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.checkpoint.lock import RunLock
from amclr_scale.config.load import build, recipe
from amclr_scale.errors import UserError
from amclr_scale.study.planning.amounts import amount, written
from amclr_scale.study.planning.load import dump_plan
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned, reference_of

CELLS, PLAN, CONFIG, ATTEMPTS = "cells.json", "study.yaml", "config.yaml", "attempts.jsonl"
RUNNING, RATES = "running.json", "rates.json"


class StudyFolder:
    """The files of one study."""

    def __init__(self, path: Path):
        self.path = path
        self.runs, self.logs = path / "runs", path / "logs"
        self.config, self.attempts = path / CONFIG, path / ATTEMPTS

    def lock(self) -> RunLock:
        """Keep other studies out, from before the first file is written to the report: `with folder.lock(): ...`.

        Raises:
            UserError: another study works here, or the folder cannot be written.
        """
        try:
            return RunLock.take(self.path)
        except UserError as error:
            raise UserError(f"folder: {str(error).partition(': ')[2]}") from error

    def is_finished(self, cell: Planned) -> bool:
        """Whether its run is complete and of this very recipe."""
        finished = not cell.waits and (self.runs / cell.name / "evaluation.json").exists()
        return finished and self.hash_of(cell) == cell.recipe_hash

    def has_failed(self, cell: Planned) -> bool:
        """Whether the last attempt at a cell failed."""
        own = [one for one in self.recorded() if one.get("cell") == cell.name]
        own += _lines(self.logs / f"{cell.name}.attempts.jsonl")
        last = max(own, key=lambda one: one.get("started") or 0, default={})
        return last.get("status") == "failed"

    def hash_of(self, cell: Planned) -> str | None:
        """The recipe of the run that has this cell's name; None while there is none."""
        file = self.runs / cell.name / "config.yaml"
        try:
            with file.open() as lines:
                return lines.readline().removeprefix("# recipe").strip()
        except FileNotFoundError:
            return None

    def check(self, plan: StudyPlan, cells: Sequence[Planned]) -> None:
        """Refuse a plan that does not go with the runs that are here.

        Raises:
            UserError: a run with a cell's name is of another recipe; or the margin changed after a cell beside the
                reference was finished.
        """
        lines: dict[str, list[str]] = {}
        for cell in cells:
            if cell.waits or self.hash_of(cell) in (None, cell.recipe_hash):
                continue
            for line in self._differences(cell):
                lines.setdefault(line, []).append(cell.name)
        if lines:
            told = "\n".join(f"{line} (in {len(names)} cells, such as {names[0]})" for line, names in lines.items())
            raise UserError(
                f"folder: {self.path} holds runs of another recipe:\n{told}\n"
                "Choose another folder=..., or move those runs away"
            )
        before = self._listed()
        reference = reference_of(plan, cells)
        compared = [
            cell
            for cell in cells
            if cell.role == "scored" and (cell.arm, cell.global_batch_size) != reference and self.is_finished(cell)
        ]
        if before and compared and not math.isclose(before["margin"], plan.equal_within):
            there = written(before["margin"], amount(plan.margin)[1])
            raise UserError(
                f"margin: {self.path} has results beside the reference's under margin {there}, got {plan.margin}; a "
                "margin is declared before the first comparison: keep it, or begin another study with folder=..."
            )

    def _differences(self, cell: Planned) -> Iterator[str]:
        tree = yaml.safe_load((self.runs / cell.name / "config.yaml").read_text("utf-8"))
        try:
            there, here = recipe(build(tree, trusted=False)), recipe(cell.config)
        except UserError as error:
            yield f"its config.yaml is not readable any more: {error}"
            return
        for key in sorted(there.keys() | here.keys()):
            if there.get(key) != here.get(key):
                yield f"{key}: there {there.get(key)!r}, in the plan {here.get(key)!r}"

    def _listed(self) -> dict[str, Any]:
        try:
            return dict(json.loads((self.path / CELLS).read_text("utf-8")))
        except (OSError, ValueError):
            return {}

    def others(self, cells: Sequence[Planned]) -> list[str]:
        """Runs in the folder that are no cells of the plan."""
        names = {cell.name for cell in cells}
        return sorted(run.name for run in self.runs.glob("*/") if run.name not in names)

    def write(self, plan: StudyPlan, tree: Mapping[str, Any], cells: Sequence[Planned]) -> None:
        """Plan, configuration and cells. Each file is there whole or not at all.

        Raises:
            UserError: the folder cannot be written.
        """
        arm, batch = reference_of(plan, cells)
        listed = {
            "plan": plan.name,
            "held_equal": plan.held_equal,
            "metrics": [metric.model_dump() for metric in plan.metrics],
            "margin": plan.equal_within,
            "reference": {"arm": arm, "global_batch_size": batch},
            "tuning": {"seeds": plan.tuning_seeds, "metric": plan.criterion.model_dump()} if plan.sweeps else None,
            "cells": [cell.entry() for cell in cells],
        }
        try:
            for folder in (self.runs, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            # the plan with the configuration beside it: this folder can be planned from alone
            _replace(self.path / PLAN, dump_plan(plan.model_copy(update={"config": CONFIG})))
            _replace(self.config, yaml.safe_dump(dict(tree), sort_keys=False, width=110, allow_unicode=True))
            _replace(self.path / CELLS, json.dumps(listed, indent=1) + "\n")
        except OSError as error:
            raise UserError(f"folder: {self.path} cannot be written: {error}") from error

    def record(self, attempt: Mapping[str, Any]) -> None:
        """Append one attempt, on a line of its own also where a kill has cut the last one off."""
        with self.attempts.open("ab+") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut = file.read() not in (b"", b"\n")
            file.write(b"\n" * cut + json.dumps(attempt).encode() + b"\n")

    def recorded(self) -> list[dict[str, Any]]:
        """All attempts; a line that was cut off by a kill is left out."""
        return _lines(self.attempts)

    def running(self, cells: Mapping[str, float]) -> None:
        """Say which cells run now, and since when."""
        _replace(self.path / RUNNING, json.dumps(dict(cells)) + "\n")

    def record_killed(self) -> None:
        """Record the attempts that were running when an earlier study was killed: until their last word in the log."""
        try:
            left = json.loads((self.path / RUNNING).read_text("utf-8"))
        except (OSError, ValueError):
            return
        for cell, started in left.items():
            log = self.logs / f"{cell}.log"
            seconds = max(0.0, log.stat().st_mtime - started) if log.exists() else 0.0
            self.record({
                "cell": cell, "started": started, "seconds": round(seconds, 3), "exit_code": None,
                "status": "interrupted", "message": "the study was killed",
            })  # fmt: skip
        self.running({})

    @property
    def rates(self) -> dict[str, float]:
        """What a pilot measured; empty before it."""
        try:
            return {key: float(value) for key, value in json.loads((self.path / RATES).read_text("utf-8")).items()}
        except FileNotFoundError:
            return {}

    def write_rates(self, rates: Mapping[str, float]) -> None:
        """Keep them: cells planned from them stay the same in a second start."""
        _replace(self.path / RATES, json.dumps(dict(rates), indent=1) + "\n")

    def records(self, cell: str) -> list[dict[str, Any]]:
        """The logged steps of a cell's run."""
        return [record for record in _lines(self.runs / cell / "metrics.jsonl") if "samples_per_second" in record]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, those that were cut off left out; none where it does not exist."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError):
        for line in path.read_text("utf-8", errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return found


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".new")
    beside.write_text(text, "utf-8")
    beside.replace(path)
