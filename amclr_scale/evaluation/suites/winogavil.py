"""WinoGAViL: which of some pictures go with a cue?

Bitton et al., "WinoGAViL: Gamified Association Benchmark to Challenge Vision-and-Language Models", NeurIPS 2022,
arXiv:2207.12576. Of an instance's candidates the model chooses as many as there are associations, those that score
highest with the prompt "A cue" ("An" before a vowel), and the instance scores

    Jaccard = |chosen and right| / |chosen or right|

Ties count against the model. DataComp counts the instances with 10 and more candidates. The file is the authors'
winogavil_dataset.csv, with candidates, cue and associations; the pictures are images/CANDIDATE.jpg beside it.
"""

import csv
import json
from collections.abc import Sequence
from math import comb

import torch
from torch import Tensor

from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.numbers import number
from amclr_scale.evaluation.retrieval import tie
from amclr_scale.evaluation.suites.opened import Measured, Opened, Place
from amclr_scale.evaluation.suites.pairs import Pairs, entries, scores

_FOLDERS = ("images", "winogavil_images", "winogavil_images/images", "")
GROUPS = {"jaccard": (0, 10**9), "jaccard_5_6": (0, 6), "jaccard_10_12": (10, 10**9)}  # fewest and most candidates
Instance = tuple[int, list[int], list[bool]]  # numbers of cue and candidates, and which of them are right


def prompt(cue: str) -> str:
    """The cue with its article."""
    word = cue.lower()
    return f"An {word}" if word[:1] in set("aeiou") else f"A {word}"


def open_winogavil(place: Place) -> Opened:
    """All instances of the file."""
    pairs, instances = Pairs(place, _FOLDERS), list[Instance]()
    try:
        rows = list(csv.DictReader(place.path.read_text("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--data: {place.one.name}: {place.path} cannot be read: {error}") from error
    for key, row in entries(place, rows):
        candidates, associations = (_names(place, key, row, column) for column in ("candidates", "associations"))
        right = [name in associations for name in candidates]
        if not 0 < sum(right) <= len(candidates) or not row.get("cue"):
            raise UserError(
                f"--data: {place.one.name}: row {key} of {place.path}: expected a cue, and associations among its "
                f"candidates, got {str(row)[:200]}"
            )
        pictures = [pairs.picture(f"{name}.jpg") for name in candidates]
        instances.append((pairs.text(prompt(row["cue"])), pictures, right))

    def measure(encode: Encode) -> Measured:
        found = jaccards(*pairs.encode(encode), instances)
        sizes = torch.tensor([len(candidates) for _, candidates, _ in instances])
        chances = torch.tensor([guessed(len(right), sum(right)) for _, _, right in instances], dtype=torch.float64)
        numbers = {}
        for name, (fewest, most) in GROUPS.items():
            mine = (sizes >= fewest) & (sizes <= most)
            if mine.any():
                numbers[name] = number(found[mine], chance=float(chances[mine].mean()))
        return numbers, {}

    if place.one.number == "jaccard_10_12" and not any(len(right) >= 10 for _, _, right in instances):
        raise UserError(
            f"--data: {place.one.name}: {place.path}: expected instances with 10 and more candidates, found none"
        )
    return Opened(pairs.files(), len(instances), pairs.encoded_here(), measure)


def _names(place: Place, key: object, row: dict[str, str], column: str) -> list[str]:
    try:
        found = json.loads(row.get(column) or "")
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UserError(
            f"--data: {place.one.name}: row {key} of {place.path}: expected a list of names at {column}, got "
            f"{str(row.get(column))[:200]}"
        )
    return found


def jaccards(image: Tensor, text: Tensor, instances: Sequence[Instance]) -> Tensor:
    """Every instance's Jaccard index: (n,) float64.

    Args:
        image: (P, D), unit length.
        text: (T, D), unit length.
    """
    pictures = [picture for _, candidates, _ in instances for picture in candidates]
    cues = [cue for cue, candidates, _ in instances for _ in candidates]
    flat = scores(image, text, pictures, cues)
    found = []
    for own, (_, _, right) in zip(torch.split(flat, [len(right) for *_, right in instances]), instances, strict=True):
        is_right = torch.tensor(right)
        k = int(is_right.sum())
        # A wrong one that is as high but for rounding comes first; what is no number is last if right, first if wrong.
        handicapped = torch.where(is_right, own.nan_to_num(-torch.inf), own.nan_to_num(torch.inf) + tie(own.dtype))
        order = sorted(range(len(right)), key=lambda one: (-float(handicapped[one]), right[one]))
        hits = sum(right[one] for one in order[:k])
        found.append(hits / (2 * k - hits))
    return torch.tensor(found, dtype=torch.float64)


def guessed(candidates: int, right: int) -> float:
    """The expected Jaccard index of as many candidates as are right, drawn at random."""
    ways = comb(candidates, right)
    return sum(
        comb(right, hits) * comb(candidates - right, right - hits) / ways * hits / (2 * right - hits)
        for hits in range(right + 1)
    )
