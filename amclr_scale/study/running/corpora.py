"""Which samples a study's cells read, kept in its folder: its later cells read the same, from wherever it goes on.

    data.json    by what data.train says, as JSON: the fingerprint of the samples, and the directory it was read from;
                 by "measured on PATH" the same of what the evaluation reads

A path in a plan is read from the current directory, so the same plan names another corpus elsewhere, or none. Recipes
hold the path as it is written, and two cells of one recipe would be of two corpora. What a run has read is what its
checkpoint says, which also those have that are older than data.json, or copied from another study; without a
checkpoint, what data.json says. What a run is measured on counts from when it is finished: before that a split in which
something was broken may be mended.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from amclr_scale.checkpoint.files import CHECKPOINTS, newest_named, read_state, replace_text
from amclr_scale.data.beside.fingerprint import SHARDS, parts
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.held_out import content_of, measured_on

FILE = "data.json"
MEASURED = "measured on "  # no JSON begins so
Corpora = dict[str, dict[str, str]]


def check_corpora(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> Corpora:
    """What the cells would read, where runs that are here have read the same.

    Returns:
        What `keep_corpora` keeps. Nothing where the plan says num_samples: the data need not be on this machine.

    Raises:
        UserError: a name stands for other samples than it did, or for none.
    """
    if plan.num_samples is not None:
        return {}
    here: Corpora = {}
    for cell in cells:
        if (name := _named(cell)) not in here:
            here[name] = {"fingerprint": open_index(cell.config.data).fingerprint, "read_from": str(Path.cwd())}
        for path, key in measured_on(cell.config):
            if (name := f"{MEASURED}{path}") not in here:
                now = content_of(path, key, cell.config)
                here[name] = {"fingerprint": now, "read_from": str(Path.cwd())}
    before = _kept(folder)
    _check_measured(folder, cells, here, before)
    begun = [cell for cell in cells if folder.hash_of(cell)]
    for cell in begun:
        name = _named(cell)
        found, known = here[name], before.get(name, {})
        read = _trained_on(folder.runs / cell.name) or known.get("fingerprint")
        if read and read != found["fingerprint"]:
            then = f", then {known['read_from']}: go on from there" if known.get("fingerprint") == read else ""
            raise UserError(
                f"data.train: expected the samples that runs in {folder.path} have read as {name} (fingerprint {read}, "
                f"of {cell.name}), got others ({found['fingerprint']}). Relative paths are read from the current "
                f"directory, now {found['read_from']}{then or ': go on from where those are'}, or begin another study "
                "with folder=..."
            )
    return before | here if begun else here


def _check_measured(folder: StudyFolder, cells: Sequence[Planned], here: Corpora, before: Corpora) -> None:
    for cell in filter(folder.is_finished, cells):
        for path, key in measured_on(cell.config):
            now = here[f"{MEASURED}{path}"]
            then = before.get(f"{MEASURED}{path}", now)
            if then["fingerprint"] == now["fingerprint"]:
                continue
            fix = "put it back as it was"
            if then["read_from"] != now["read_from"]:
                fix = (
                    f"relative paths are read from the current directory, now {now['read_from']}, then "
                    f"{then['read_from']}: go on from there"
                )
            raise UserError(
                f"{key}: expected what {cell.name} in {folder.path} was measured on as {path} (fingerprint "
                f"{then['fingerprint']}), got something else ({now['fingerprint']}), whose scores do not compare with "
                f"those; {fix}, or begin another study with folder=..."
            )


def _named(cell: Planned) -> str:
    return json.dumps(cell.config.model_dump(mode="json")["data"]["train"])


def _trained_on(run: Path) -> str | None:
    """The fingerprint of the samples that a run has trained on; None where no checkpoint says so."""
    checkpoint, _ = newest_named(run / CHECKPOINTS)
    if checkpoint is None:
        return None
    try:
        shards = parts(read_state(checkpoint).get("data_fingerprint", ""))[SHARDS]
    except (OSError, UserError):  # damaged: whoever goes on from it says so
        return None
    return shards.partition("-")[0] or None  # behind it stands that of communities


def keep_corpora(folder: StudyFolder, corpora: Corpora) -> None:
    """Write what `check_corpora` gave.

    Raises:
        OSError: the folder cannot be written.
    """
    if corpora:
        replace_text(folder.path / FILE, json.dumps(corpora, indent=1) + "\n")


def _kept(folder: StudyFolder) -> Corpora:
    """Nothing where the study began before this file was kept."""
    file = folder.path / FILE
    try:
        kept = json.loads(file.read_text("utf-8"))
        return {name: {key: str(one[key]) for key in ("fingerprint", "read_from")} for name, one in kept.items()}
    except FileNotFoundError:
        return {}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: expected the data of a study, got what is none ({error!r}); remove it") from error
