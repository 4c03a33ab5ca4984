"""Amounts of an outcome with their unit, such as `0.5 points`: what a margin and a spread are given in.

A score is a share of one, a table shows percent, and half a point is 0.005 of the one and 0.5 of the other. A bare
number would be read as either. Imports no torch.
"""

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import BeforeValidator

from amclr_scale.metrics.scores import score_of

POINTS, RANKS, PLAIN = "points", "ranks", ""
FACTORS = {POINTS: 0.01, RANKS: 1.0, PLAIN: 1.0}
_ONE = {"point": POINTS, "rank": RANKS}
# A margin may be this share of what the reference scores above guessing. At the half, an arm that has learned half as
# much still "matches"; non-inferiority trials keep half of the effect over placebo for the same reason (FDA,
# "Non-Inferiority Clinical Trials to Establish Effectiveness", 2016).
MOST_OF_EFFECT = 0.5


def unit_of_key(key: str) -> str:
    """The unit of a result of evaluation.json, by its name."""
    score = score_of(key)
    return score.unit if score else PLAIN


def unit_of_keys(keys: Sequence[str]) -> str | None:
    """That of their mean; None where they have several."""
    units = {unit_of_key(key) for key in keys}
    return units.pop() if len(units) == 1 else None


def _read(value: object) -> str:
    """`0.5 points`, in one way of writing it."""
    found = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?)\s*([A-Za-z%]*)\s*", str(value))
    unit = _ONE.get(found[2], found[2]) if found else None
    if not found or unit not in FACTORS or float(found[1]) <= 0:
        raise ValueError("expected a number above 0 with its unit, such as '0.5 points'")
    return written(float(found[1]) * FACTORS[unit], unit)


Amount = Annotated[str, BeforeValidator(_read)]


def amount(text: str) -> tuple[float, str]:
    """An amount in the outcome's own unit, in which a share is one at most, and the unit it was given in."""
    number, _, unit = text.partition(" ")
    unit = _ONE.get(unit, unit)
    return float(number) * FACTORS[unit], unit


def written(value: float, unit: str) -> str:
    """An amount in words, from the outcome's own unit."""
    number = f"{value / FACTORS[unit]:.12g}"
    return f"{number} {unit.removesuffix('s') if number == '1' else unit}".rstrip()
