"""A study's folder, read: what finished with all it measured, and what did not with the reason.

The folder is the one `launch/study.py` makes:

    study.yaml           the plan, all defaults written out
    cells.json           metrics, margin, reference, and every cell: arm, batch size, seed, recipe hash, cost
    runs/CELL/           run folders of launch/train.py
    attempts.jsonl       one line per attempt at a cell
    logs/CELL.log        its console
    logs/CELL.attempts.jsonl  attempts of a job array's task

A cell counts as finished when its run has an evaluation.json and config.yaml begins with the cell's recipe hash.
Nothing is guessed: what a file does not say is None.
"""

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.errors import UserError
from amclr_scale.evaluation.items import FILE as ITEMS
from amclr_scale.evaluation.items import load_items
from amclr_scale.study.analysis.results import Cell, Metric, Missing, Run, Study


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
        tuning = listed.get("tuning")
        criterion = _metric(tuning["metric"]) if tuning and tuning["seeds"] else None
        name, held_equal = str(listed["plan"]), str(listed["held_equal"])
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{folder / 'study.yaml'}: expected the plan of a study, got: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{folder / 'cells.json'}: expected the cells of a study as launch/study.py writes them, got: "
            f"{type(error).__name__} {error}"
        ) from error
    attempts = _attempts([folder / "attempts.jsonl", *sorted(folder.glob("logs/*.attempts.jsonl"))])
    runs: list[Run] = []
    missing: list[Missing] = []
    found: Run | Missing
    wanted = (*metrics, *([criterion] if criterion else []))
    for cell in cells:
        try:
            # rates are chosen by scores alone: items are compared of scored cells, and only those of an outcome
            compared = {key for metric in metrics for key in metric.keys} if cell.role == "scored" else set[str]()
            found = _read_run(folder / "runs" / cell.cell, cell, wanted, attempts.get(cell.cell, []), compared)
        except (OSError, ValueError, yaml.YAMLError) as error:  # damaged, or being written just now
            found = Missing(cell, "unreadable", str(error))
        if isinstance(found, Run):
            runs.append(found)
        else:
            missing.append(found)
    scored, chose = (tuple(run for run in runs if run.cell.role == role) for role in ("scored", "tuning"))
    return Study(folder, plan, name, held_equal, metrics, margin, reference, scored, tuple(missing), chose, criterion)


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


def _attempts(paths: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """Attempts by cell, in order of time. A line that was cut off by a kill is left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
            try:
                attempt = json.loads(line)
                found.setdefault(attempt["cell"], []).append(attempt)
            except (ValueError, KeyError, TypeError):
                continue
    return {cell: sorted(tried, key=lambda one: one.get("started") or 0) for cell, tried in found.items()}


def _read_run(
    folder: Path, cell: Cell, metrics: tuple[Metric, ...], attempts: list[dict[str, Any]], compared: Set[str]
) -> Run | Missing:
    if cell.waits:
        return Missing(cell, "waits", "for the tuning cells that choose its learning rate")
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
    config = flatten(yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)))
    if config.get("objective.module"):
        config["objective.module"] = str(folder / config["objective.module"])
    return Run(
        cell=cell,
        results=results,
        items=load_items(folder / ITEMS, compared) if compared and (folder / ITEMS).exists() else {},
        records=tuple(_records(folder / "metrics.jsonl")),
        config=config,
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


NAMES = ("data.train", "evaluation.splits")  # what they hold is named by users: one value each


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value and f"{prefix}{key}" not in NAMES:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
