"""Runs beside one another: what trained them, how many samples they saw, and every column of what was measured.

A row is a folder with results: a run, one of its checkpoints, or an --output of `evaluate`. Columns are those of the
suites (SUITE.json), and retrieval and zero-shot of the run's own held-out splits (evaluation.json). A column whose
numbers were taken on other data, over other data sets or by other settings is said to be not comparable, and why.
Imports no torch.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.evaluation.suites.catalogue import SUITES
from amclr_scale.metrics.scores import words_of

OWN = ("image_to_text_R@1", "text_to_image_R@1", "R@mean", "zero_shot_top1")  # of evaluation.json
_SETTINGS = ("resize", "clean_captions", "caption", "class_names", "templates", "classes")
_ABOUT = ("arm", "batch", "samples")


@dataclass(frozen=True)
class Entry:
    """One number of a row.

    Attributes:
        value: a share of one.
        part: over how many data sets of how many; "": all.
        facts: what has to be the same for two of them to be compared, each in words.
    """

    value: float
    part: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One model."""

    name: str
    arm: str | None = None
    batch: int | None = None
    samples: int | None = None
    entries: Mapping[str, Entry] = field(default_factory=dict)


def read_rows(folders: Sequence[str], suites: Sequence[str] = ()) -> list[Row]:
    """Every row that folders hold.

    Args:
        suites: only these suites, and nothing of evaluation.json; none: all that was measured.

    Raises:
        UserError: a folder holds no results, or a file in it is damaged.
    """
    rows = []
    for given in folders:
        path = Path(given).expanduser()
        if not path.is_dir():
            what = "which is a file" if path.exists() else "which does not exist"
            raise UserError(f"RUNS: expected folders with results, got {given}, {what}")
        found = [row for row in _rows_of(path, suites) if row.entries]
        if not found:
            told = f" of {', '.join(suites)}" if suites else ""
            raise UserError(
                f"RUNS: expected folders with results{told}, got {given}, which has none; measure it first: "
                f"amclr-scale evaluate {given} --suite {suites[0] if suites else 'SUITE'} --data FOLDER"
            )
        rows += found
    names = [row.name for row in rows]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"RUNS: expected every run once, with a name of its own, got {twice} twice")
    return rows


def _rows_of(path: Path, suites: Sequence[str]) -> Iterator[Row]:
    config = _yaml(path / "config.yaml")
    with _told(path / "config.yaml", "what a run writes"):
        arm = _of_kind(str | None, _dig(config, "objective", "name"), "objective.name")
        batch = _of_kind(int | None, _dig(config, "train", "global_batch_size"), "train.global_batch_size")
    own = {} if suites else _own_entries(path / "evaluation.json", config)
    folders = [path, path / "evaluation"]
    final = own | {title: one for folder in folders for title, one in _suite_entries(folder, suites).items()}
    yield Row(path.name, arm, batch, _samples(path, None), final)
    beside = path / "evaluation"  # folders of checkpoints and of other weights; those called as a suite hold its parts
    for folder in sorted(beside.iterdir()) if beside.is_dir() else ():
        if folder.is_dir() and folder.name not in SUITES:
            step = folder.name if folder.name.startswith("step_") else None
            yield Row(f"{path.name}/{folder.name}", arm, batch, _samples(path, step), _suite_entries(folder, suites))


def _suite_entries(folder: Path, suites: Sequence[str]) -> dict[str, Entry]:
    entries = {}
    for name in suites or SUITES:
        file = folder / f"{name}.json"
        found = _json(file)
        if found.get("suite") != name:
            continue
        with _told(file, f"what `amclr-scale evaluate --suite {name}` writes"):
            how = {key: found.get(key) for key in ("resize", "clean_captions")}
            for title, one in _of_kind(dict, found["columns"], "columns").items():
                if _of_kind(dict, one, title)["value"] is not None:
                    entries[f"{name}: {title}"] = _column(title, one, _of_kind(dict, found["sets"], "sets"), how)
    return entries


def _column(title: str, one: Mapping[str, Any], sets: Mapping[str, Any], how: Mapping[str, Any]) -> Entry:
    over, missing = (_of_kind(list, one[key], f"{title}: {key}") for key in ("over", "missing"))
    part = f"{len(over)} of {len(over) + len(missing)}" if missing else ""
    digests = {f"the data of {each}": _of_kind(dict, sets[each], each)["data_sha256"] for each in over}
    facts = {"the data sets it is taken over": sorted(over), **digests, **how}
    return Entry(_number(one["value"], title), part, facts)


def _own_entries(file: Path, config: Mapping[str, Any]) -> dict[str, Entry]:
    found, entries = _json(file), {}
    settings = {f"evaluation.{key}": _dig(config, "evaluation", key) for key in _SETTINGS}
    for key, value in found.items():
        split, _, number = key.rpartition("/")
        if number in OWN and value is not None:
            sizes = {f"the number of {what}": found.get(f"{split}/{what}") for what in ("images", "texts")}
            with _told(file, "what a run writes"):
                entries[f"{split}: {words_of(number)}"] = Entry(_number(value, key), facts=settings | sizes)
    return entries


@contextmanager
def _told(file: Path, expected: str) -> Iterator[None]:
    """What is missing in a file, or of another kind, is a `UserError` that names it."""
    try:
        yield
    except KeyError as error:
        raise UserError(f"RUNS: {file}: expected {expected}, got none of {error}; measure again") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"RUNS: {file}: expected {expected}, got {error}; measure again") from error


def _of_kind(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{place}: {value!r:.100}")
    return value


def _number(value: Any, place: str) -> float:
    number = float(_of_kind(int | float, value, place))
    if not math.isfinite(number):
        raise ValueError(f"{place}: {number}")
    return number


def _samples(run: Path, step: str | None) -> int | None:
    """How many samples a run had seen at its end, or at a checkpoint's step."""
    file, found = run / "metrics.jsonl", None
    if not file.is_file():
        return None
    number = int(step.removeprefix("step_")) if step else None
    with file.open(encoding="utf-8", errors="replace") as lines, _told(file, "what a run writes"):
        for line in lines:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):  # the last line of a run that was killed
                continue
            if isinstance(record, dict) and "samples" in record and (number is None or record.get("step") == number):
                found = int(_of_kind(int, record["samples"], "samples"))
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"RUNS: {file}: expected JSON, got {error}; measure again") from error
    return found if isinstance(found, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"RUNS: {file}: expected YAML, got {error}") from error
    return found if isinstance(found, dict) else {}


def _dig(tree: Mapping[str, Any], *path: str) -> Any:
    found: Any = tree
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


@dataclass(frozen=True)
class Leaderboard:
    """Rows in order.

    Attributes:
        columns: of numbers.
        sorted_by: one of them, or batch, samples, arm.
        differs: column -> what its numbers do not share, in words.
    """

    rows: list[Row]
    columns: list[str]
    sorted_by: str
    differs: dict[str, str]


def leaderboard(rows: Sequence[Row], sort: str | None = None) -> Leaderboard:
    """Rows sorted by a column, the best first; those without a number in it last.

    Args:
        sort: a column, or the end of its name; None: the last column of the first suite, or else the first.

    Raises:
        UserError: there is no such column, or there are several.
    """
    columns = list(dict.fromkeys(title for row in rows for title in row.entries))
    by = _chosen(columns, sort) if sort else _overall(columns)

    def key(row: Row) -> tuple[bool, Any]:
        if by in _ABOUT:
            value = getattr(row, by)
            return value is None, value if value is not None else 0
        one = row.entries.get(by)
        return one is None, -one.value if one else 0

    return Leaderboard(sorted(rows, key=key), columns, by, {c: why for c in columns if (why := _differs(rows, c))})


def _chosen(columns: Sequence[str], sort: str) -> str:
    if sort in (*columns, *_ABOUT):
        return sort
    found = [column for column in columns if column.casefold().endswith(sort.casefold())]
    if len(found) != 1:
        listed = "; ".join([*_ABOUT, *columns])
        several = f", which several end in: {'; '.join(found)}" if found else did_you_mean(sort, columns)
        raise UserError(f"--sort: expected one of {listed}; got {sort}{several}")
    return found[0]


def _overall(columns: Sequence[str]) -> str:
    suite = next((name for name in SUITES if any(one.startswith(f"{name}: ") for one in columns)), None)
    return [one for one in columns if one.startswith(f"{suite}: ")][-1] if suite else columns[0]


def _differs(rows: Sequence[Row], column: str) -> str:
    """What the numbers of a column do not share, and which rows differ from the first; "" where they compare."""
    there = [(row.name, row.entries[column].facts) for row in rows if column in row.entries]
    first, facts = there[0]
    found = []
    for key in dict.fromkeys(key for _, one in there for key in one):
        others = [name for name, one in there if key in one and key in facts and one[key] != facts[key]]
        if others:
            found.append(f"{key} ({', '.join(others)} against {first})")
    return ", ".join(found)
