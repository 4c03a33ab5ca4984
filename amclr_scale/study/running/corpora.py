"""Which samples a study's cells read, kept in its folder: its later cells read the same, from wherever it goes on.

    data.json    by what data.train says, as JSON: the fingerprint of the samples, and the directory it was read from

A path in a plan is read from the current directory, so the same plan names another corpus elsewhere, or none. Recipes
hold the path as it is written, and two cells of one recipe would be of two corpora.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from amclr_scale.checkpoint.files import replace_text
from amclr_scale.data.indexing import open_index
from amclr_scale.errors import UserError
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder

FILE = "data.json"
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
    named = {json.dumps(cell.config.model_dump(mode="json")["data"]["train"]): cell.config.data for cell in cells}
    here = {name: {"fingerprint": open_index(data).fingerprint, "read_from": str(Path.cwd())}
            for name, data in named.items()}  # fmt: skip
    before = _kept(folder)
    if not any(folder.hash_of(cell) for cell in cells):
        return here  # nothing was read yet
    for name, found in here.items():
        if (known := before.get(name)) and known["fingerprint"] != found["fingerprint"]:
            raise UserError(
                f"data.train: expected the samples that runs in {folder.path} have read as {name} (fingerprint "
                f"{known['fingerprint']}), got others ({found['fingerprint']}). Relative paths are read from the "
                f"current directory, now {found['read_from']}, then {known['read_from']}: go on from there, or begin "
                "another study with folder=..."
            )
    return before | here


def keep_corpora(folder: StudyFolder, corpora: Corpora) -> None:
    """Write what `check_corpora` gave.

    Raises:
        OSError: the folder cannot be written.
    """
    if corpora:
        replace_text(folder.path / FILE, json.dumps(corpora, indent=1) + "\n")


def _kept(folder: StudyFolder) -> Corpora:
    """Nothing where the study began before this file was kept."""
    try:
        return dict(json.loads((folder.path / FILE).read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{folder.path / FILE}: expected the data of a study, got: {error}; remove it") from error
