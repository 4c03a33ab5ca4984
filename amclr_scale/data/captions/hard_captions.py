"""Captions that are wrong by one change: hard negatives, made by rules or read from a sample.

    words       two words change places             Yuksekgonul et al., ICLR 2023, arXiv:2210.01936
    attribute   a colour, a size, ... becomes another of its kind
    number      a number from two to ten becomes another       Paiss et al., ICCV 2023, arXiv:2302.12066

Drawn from (seed, pass, id, which one): the same on any number of ranks and workers. Rules change English words and know
no grammar. Of a caption none of them may be possible ("dog"): it then has no negative, which is said, not papered over.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations

from amclr_scale.config import schema
from amclr_scale.config.text_rules import TEXT_RULES
from amclr_scale.data.decoding import Field, Sample
from amclr_scale.data.randomness import Draws, Purpose

_LOOKED_AT = 32  # words of a caption, of which pairs change places
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_SMALL = frozenset(
    re.split(" ", "a an the of and or with in on at to by for from is are its their his her this that as")
)
_KINDS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in (
        "red orange yellow green blue purple pink brown black white grey",
        "small large tiny huge",
        "big little",
        "tall short",
        "long brief",
        "thick thin",
        "old young new",
        "hot cold warm cool",
        "wet dry",
        "open closed",
        "full empty",
        "light dark medium",
        "happy sad angry",
        "left right",
        "up down",
        "upper lower",
        "top bottom",
        "above below",
        "inside outside",
        "front back",
        "wooden metal plastic stone glass paper",
        "round square triangular",
        "man woman boy girl",
        "day night",
    )
)
_OTHERS = {word: [other for other in kind if other != word] for kind in _KINDS for word in kind}
_NUMBERS = ["two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = [str(n) for n in range(2, 11)]

Place = tuple[int, int]  # of a word in its caption


def _words(caption: str) -> list[Place]:
    return [found.span() for found in _WORD.finditer(caption)][:_LOOKED_AT]


def _like(word: str, other: str) -> str:
    """Another word, beginning as this one does."""
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def swapped(caption: str) -> Iterator[str]:
    """Every caption in which two words have changed places; words that carry meaning, where there are two of those."""
    places = _words(caption)
    heavy = [place for place in places if caption[slice(*place)].lower() not in _SMALL]
    for (a, b), (c, d) in combinations(heavy if len(heavy) > 1 else places, 2):
        yield caption[:a] + caption[c:d] + caption[b:c] + caption[a:b] + caption[d:]


def _replaced(caption: str, others: Callable[[str], Sequence[str]]) -> Iterator[str]:
    for a, b in _words(caption):
        word = caption[a:b]
        for other in others(word.lower()):
            yield caption[:a] + _like(word, other) + caption[b:]


def with_other_attribute(caption: str) -> Iterator[str]:
    """Every caption in which one word of a known kind has become another of its kind."""
    return _replaced(caption, lambda word: _OTHERS.get(word, ()))


def with_other_number(caption: str) -> Iterator[str]:
    """Every caption in which a number from two to ten has become another of these."""

    def others(word: str) -> list[str]:
        known = next((known for known in (_NUMBERS, _DIGITS) if word in known), [])
        return [other for other in known if other != word]

    return _replaced(caption, others)


_MADE_BY: dict[str, Callable[[str], Iterator[str]]] = {
    "words": swapped, "attribute": with_other_attribute, "number": with_other_number,
}  # fmt: skip
assert _MADE_BY.keys() == set(TEXT_RULES)


class HardCaptions:
    """The wrong captions of a recipe: `data.text_negatives` of each sample, by `data.text_negative`."""

    def __init__(self, data: schema.Data):
        self.count = data.text_negatives
        named = [data.text_negative] if isinstance(data.text_negative, str) else data.text_negative
        self.places = [name if name in _MADE_BY else Field.parse(name) for name in named] if self.count else []

    @property
    def members(self) -> frozenset[str]:
        """The members of a sample that they are read from."""
        return frozenset(place.member for place in self.places if isinstance(place, Field))

    def draw(self, caption: str, sample: Sample, seed: int, number: int, name: int) -> list[str | None]:
        """So many captions that differ from this one and from one another; None where there are no more.

        Args:
            caption: that a pass (`number`) shows of the sample (`name`).

        Raises:
            BadSampleError: one in the sample is too long.
        """
        taken, chosen = {caption.casefold()}, list[str | None]()
        for which in range(self.count):
            draws = Draws(seed, Purpose.NEGATIVE, number, name, which)
            places, found = list(self.places), list[str]()
            while places and not found:
                place = places.pop(draws.below(len(places)))
                made = sample.captions(place, optional=True) if isinstance(place, Field) else _MADE_BY[place](caption)
                found = [other for other in dict.fromkeys(made) if other.casefold() not in taken]
            chosen.append(found[draws.below(len(found))] if found else None)
            taken |= {one.casefold() for one in chosen[-1:] if one is not None}
        return chosen
