"""Arms that are trained beside features of another cell: what they name, and where it will lie. Imports no torch.

DRRho's reference and B3's communities come from a model that is trained already. Where that is a cell of the same
plan, an arm says which (`features_of`), and its words name the files that the study makes of it, by FEATURES/:

    - {name: drrho, like: dcl, features_of: clip-B64, words: [objective.name=drrho,
       data.image_reference=FEATURES/image.npy, data.text_reference=FEATURES/text.npy]}
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from amclr_scale.errors import UserError
from amclr_scale.study.planning.plan import ArmPlan, Communities, StudyPlan

PREFIX = "FEATURES/"  # in a word, for the folder of what is made
IMAGE, TEXT, COMMUNITIES = NAMES = ("image.npy", "text.npy", "communities.npy")


class Cell(Protocol):
    """What is asked of a cell whose features are taken."""

    @property
    def name(self) -> str: ...
    @property
    def waits(self) -> bool: ...
    @property
    def features(self) -> "Features | None": ...
    @property
    def recipe_hash(self) -> str: ...


@dataclass(frozen=True)
class Features:
    """What a cell reads of another one.

    Attributes:
        of: that cell's name.
        folder: of the files, named by that cell's recipe too: of another model, they are another recipe's.
        communities: how those are grown; None: they are not read.
    """

    of: str
    folder: Path
    communities: Communities | None

    @property
    def files(self) -> list[Path]:
        """All that is to be made."""
        grown = [self.folder / communities_name(self.communities)] if self.communities else []
        return [self.folder / IMAGE, self.folder / TEXT, *grown]

    @property
    def made(self) -> bool:
        """Whether they are there, whole: what each is of is written beside it when it is done."""
        return all(file.with_name(f"{file.name}.json").is_file() and file.is_file() for file in self.files)


def communities_name(how: Communities) -> str:
    """A file name that says how they were grown."""
    return f"communities-{how.size}-{how.skip}-{how.neighbours}.npy"


def taken(
    plan: StudyPlan, arm: ArmPlan, seed: int, words: Sequence[str], known: Mapping[str, Cell]
) -> tuple[Features | None, list[str]]:
    """The features that a cell of an arm reads, and its words with their places put in.

    Args:
        plan, arm, seed: of the cell.
        words: the arm's.
        known: cells by name, of the arms above.

    Raises:
        UserError: there is no such cell, it is not known yet, or words do not go with `features_of` or `communities`.
    """
    key = f"arms.{arm.name}.features_of"
    named = [word.partition("=")[2].removeprefix(PREFIX) for word in words if word.partition("=")[2].startswith(PREFIX)]
    for name in named:
        if name not in NAMES:
            raise UserError(f"arms.{arm.name}.words: expected {PREFIX} and one of {', '.join(NAMES)}, got {name}")
    if COMMUNITIES not in named and arm.communities != Communities():
        raise UserError(
            f"arms.{arm.name}.communities: no word reads {PREFIX}{COMMUNITIES}, so nothing is grown; name it in words, "
            f"as data.communities={PREFIX}{COMMUNITIES}, or remove the key"
        )
    if arm.features_of is None:
        if named:
            raise UserError(f"{key}: expected the cell that makes {PREFIX}{named[0]}, such as clip-B64, got none")
        return None, list(words)
    if not named:
        raise UserError(f"{key}: no word reads it; name a file in words, such as data.image_reference={PREFIX}{IMAGE}")
    of = known.get(arm.features_of) or known.get(f"{arm.features_of}-s{seed}")
    if of is None:
        raise UserError(
            f"{key}: expected a cell of an arm above this one ({', '.join(known) or 'there is none'}), or its name "
            f"without the seed, got {arm.features_of}" + (f", which has no seed {seed}" if seed else "")
        )
    if of.waits:
        raise UserError(f"{key}: the learning rate of {of.name} is chosen only later; name a cell whose rate is given")
    if of.features:
        raise UserError(f"{key}: {of.name} reads features itself; name a cell of an arm without features_of")
    folder = plan.place / "features" / f"{of.name}-{of.recipe_hash}"
    communities = arm.communities if COMMUNITIES in named else None
    places = {name: folder / name for name in NAMES} | {COMMUNITIES: folder / communities_name(arm.communities)}
    put_in = []
    for word in words:
        option, _, value = word.partition("=")
        put_in.append(f"{option}={places[value.removeprefix(PREFIX)]}" if value.startswith(PREFIX) else word)
    return Features(of.name, folder, communities), put_in
