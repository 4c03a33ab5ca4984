"""From an icon's name to what it shows: words, concept, style, kind, captions.

`home-outline-24` of one set and `home-bold` of another show the same concept, `home`. What has to go are words of style
at either end of a name, and numbers at its end. Some words of style can be a thing as well (traffic-light, line-chart):
those go only where the set itself declares them, or where a twentieth of its names have them at that end.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from amclr_scale.corpora.icon_sets import IconSet

ALWAYS = frozenset({"outline", "outlined", "filled", "fill", "rounded", "duotone", "twotone", "linear", "glyph"})
OFTEN = frozenset({
    "bold", "light", "thin", "sharp", "line", "lined", "solid", "round", "regular", "duo", "flat",
    "remix", "broken", "baseline", "semibold", "bulk", "stroke", "fat", "thick", "o", "r", "f", "icon",
    "negative", "expressive", "loop", "freehand", "plump", "sketch", "24px", "1x1", "4x3", "bxl", "bxs", "md", "ios",
    "monotone",
})  # fmt: skip
_COMMON = 0.05


@dataclass(frozen=True)
class Meaning:
    """What a name says."""

    words: str
    concept: str
    style: str  # the words that are not part of the concept, as they came; may be empty


class Names:
    """Reads the names of one set."""

    def __init__(self, of: IconSet):
        split = [_words(name) for name in of.names]
        enough = max(2, _COMMON * len(split))
        first = Counter(words[0] for words in split if words)
        last = Counter(words[-1] for words in split if words)
        declared = [frozenset(word for word in ends if not word.isdecimal()) for ends in of.ends]
        self._first = declared[0] | {word for word, n in first.items() if word in OFTEN | ALWAYS and n >= enough}
        self._last = declared[1] | ALWAYS | {word for word, n in last.items() if word in OFTEN and n >= enough}

    def read(self, name: str) -> Meaning:
        """The meaning of a name of this set; a name of nothing but style and numbers is its own concept."""
        words = _words(name)
        start, end = 0, len(words)
        while end > start and (words[end - 1] in self._last or words[end - 1].isdecimal()):
            end -= 1
        while start < end and words[start] in self._first:
            start += 1
        if start == end:
            start, end = 0, len(words)
        return Meaning(" ".join(words), " ".join(words[start:end]), " ".join([*words[:start], *words[end:]]))


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^0-9a-z]+", name.lower()) if word]


# First rule that holds. Sets of brands are a kind of their own: proper nouns, one picture each.
_KINDS = (
    ("logo", re.compile(r"logo|brand", re.IGNORECASE)),
    ("emoji", re.compile(r"emoji", re.IGNORECASE)),
    ("flag", re.compile(r"flag", re.IGNORECASE)),
    ("map", re.compile(r"\bmaps?\b", re.IGNORECASE)),
    ("programming", re.compile(r"^programming$", re.IGNORECASE)),
    ("thematic", re.compile(r"^thematic$", re.IGNORECASE)),
)


def kind_of(of: IconSet) -> str:
    """`ui`, `logo`, `emoji`, `flag`, `map`, `programming` or `thematic`, by the set's title and the archive's group."""
    if of.group == "Flags / Maps":
        return "flag" if re.search("flag", of.title, re.IGNORECASE) else "map"
    return next((kind for kind, rule in _KINDS if rule.search(of.title) or rule.search(of.group)), "ui")


def captions(meaning: Meaning, category: str, title: str) -> list[str]:
    """Every way to say it, the plain words first; none twice."""
    words = meaning.concept.split()
    found = [meaning.words, meaning.concept]
    found += [f"{meaning.concept}, {category}"] if category else []
    found += [f"{meaning.concept}, drawn by {title}"]
    if meaning.style:
        found += [f"{meaning.style} {meaning.concept}", f"{meaning.concept} ({meaning.style})"]
    if len(words) > 1:
        found += [f"{words[-1]}: {' '.join(words[:-1])}"]
    return _distinct(found)


def _distinct(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))
