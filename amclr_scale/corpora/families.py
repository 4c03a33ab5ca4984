"""Which sets of icons are of one hand: holding out a set says little when its sister is trained on.

Sets are joined when they name the same author, when they are known to descend from one another, or when a part of the
smaller one's pictures are pixel for pixel in the larger one. Pictures that many sets have (a plain circle) join none.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from itertools import combinations

from amclr_scale.corpora.icon_sets import IconSet

# By prefix or the part of it before a dash: forks and redrawings under another author's name.
KNOWN = (
    ("ic", "mdi", "mdi-light", "material-symbols", "material-symbols-light", "line-md"),
    ("fa", "fa6", "fa7", "fa-solid", "fa-brands", "fa-regular", "la"),
    ("ion", "famicons"),
    ("feather", "fe", "lucide", "lucide-lab"),
    ("boxicons", "bx", "bxs", "bxl"),
    ("emojione", "emojione-v1", "emojione-monotone"),
    ("noto", "noto-v1"),
)
SHARED = 0.03  # of the smaller set's pictures
COMMON = 5  # sets; a picture that so many have says nothing


def families(sets: Iterable[IconSet], digests: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The family of every set, named after its first set.

    Args:
        digests: hashes of each set's pictures, by prefix.
    """
    parent = {one.prefix: one.prefix for one in sets}

    def root(prefix: str) -> str:
        while parent[prefix] != prefix:
            prefix = parent[prefix]
        return prefix

    def join(prefixes: Iterable[str]) -> None:
        roots = sorted({root(prefix) for prefix in prefixes if prefix in parent})
        parent.update(dict.fromkeys(roots, roots[0]) if roots else {})

    authors = defaultdict(list)
    for one in sets:
        authors[one.author.lower()].append(one.prefix)
    for author, prefixes in authors.items():
        if author:
            join(prefixes)
    for related in KNOWN:
        join(prefix for prefix in parent if prefix in related or prefix.split("-")[0] in related)
    for pair in _sharing(digests):
        join(pair)
    return {prefix: root(prefix) for prefix in parent}


def _sharing(digests: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """Pairs of sets that have a part of their pictures in common."""
    owners = defaultdict(set)
    sizes = Counter[str]()
    for prefix, found in digests.items():
        for digest in set(found):
            owners[digest].add(prefix)
            sizes[prefix] += 1
    shared = Counter[tuple[str, str]]()
    for prefixes in owners.values():
        if 1 < len(prefixes) < COMMON:
            shared.update(combinations(sorted(prefixes), 2))
    return [pair for pair, n in shared.items() if n >= max(2, SHARED * min(sizes[prefix] for prefix in pair))]
