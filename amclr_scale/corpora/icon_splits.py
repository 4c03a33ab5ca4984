"""Who is trained on, and who is not: by concept, by artist, and at random; twice, for choosing and for reporting.

    train                       the rest
    val_concept, tune_concept   concepts that no other split has, by artists who are trained on
    val_style, tune_style       whole families of sets that are never trained on; concepts that are
    val_pairs, tune_pairs       pictures at random: their concepts and artists are trained on, as a rule
    val_common                  those of val_style whose concept many training pictures show: zero-shot classification
    probe_train, probe_test     pictures with a category, of train and of val_style and val_pairs: probes, neighbours

A picture by a held-out artist of a concept that is not trained on is in no split: it would measure two things at once.
Every choice is a hash of a name, so that a split does not depend on an order.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from amclr_scale.errors import UserError

LEFT_OUT = "left out"


@dataclass(frozen=True)
class Picture:
    """One icon that is kept.

    Attributes:
        offset, length: where its picture lies in the file of its set.
    """

    prefix: str
    name: str
    digest: str
    offset: int
    length: int
    concept: str
    category: str
    family: str

    @property
    def key(self) -> str:
        """What names it: PREFIX:NAME."""
        return f"{self.prefix}:{self.name}"


@dataclass(frozen=True)
class Sizes:
    """How large the splits are.

    Attributes:
        val_sets, tune_sets: sets held out, at least; of families with `smallest` to `largest` pictures.
        val_items, tune_items: pictures of theirs whose concept is trained on, at least.
        val_concepts, tune_concepts, val_pairs, tune_pairs: shares.
        common: training pictures of a concept that make it one of val_common's.
        categories, per_category: classes of the probe, and training pictures of each at most.
    """

    val_sets: int = 10
    val_items: int = 8000
    tune_sets: int = 5
    tune_items: int = 3000
    smallest: int = 200
    largest: int = 6000
    val_concepts: float = 0.02
    tune_concepts: float = 0.01
    val_pairs: float = 0.01
    tune_pairs: float = 0.005
    common: int = 20
    categories: int = 50
    per_category: int = 200


def share(*name: str) -> float:
    """A number in [0, 1) that is a function of a name."""
    return int.from_bytes(hashlib.sha256("\0".join(name).encode()).digest()[:8], "big") / 2**64


def _drawn(name: str, purpose: str, first: float, second: float) -> str:
    u = share(purpose, name)
    return "val" if u < first else "tune" if u < first + second else ""


@dataclass(frozen=True)
class HeldOut:
    """Families that are not trained on, and for what."""

    val: tuple[str, ...]
    tune: tuple[str, ...]


def choose_families(pictures: Sequence[Picture], kinds: Mapping[str, str], sizes: Sizes) -> HeldOut:
    """Families of user-interface sets, in the order of their hashes, until there are enough.

    Args:
        kinds: of every set, by prefix.

    Raises:
        UserError: all of them are not enough.
    """
    members: dict[str, set[str]] = defaultdict(set)
    counts = Counter(picture.family for picture in pictures)
    for picture in pictures:
        members[picture.family].add(picture.prefix)
    drawn_by: dict[str, set[str]] = defaultdict(set)  # families that have a trainable picture of a concept
    for picture in pictures:
        if not _concept(picture, sizes) and not _pair(picture, sizes):
            drawn_by[picture.concept].add(picture.family)
    candidates = [
        family
        for family, prefixes in members.items()
        if sizes.smallest <= counts[family] <= sizes.largest and {kinds[prefix] for prefix in prefixes} == {"ui"}
    ]
    candidates.sort(key=lambda family: share("family", family))
    by_family: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_family[picture.family].append(picture)

    held = set[str]()
    chosen = list[tuple[str, ...]]()
    for purpose, sets, items in (("val", sizes.val_sets, sizes.val_items), ("tune", sizes.tune_sets, sizes.tune_items)):
        own = list[str]()
        while True:
            known = sum(
                bool(drawn_by[picture.concept] - held) and not _concept(picture, sizes)
                for family in own
                for picture in by_family[family]
            )
            if sum(len(members[family]) for family in own) >= sets and known >= items:
                break
            if not candidates:
                raise UserError(
                    f"--archive: expected families of icon sets to hold out ({sets} sets, {items:,} pictures of "
                    f"concepts that others draw) for {purpose}_style, found {known:,} such pictures in all that is left"
                )
            own.append(candidates.pop(0))
            held.add(own[-1])
        chosen.append(tuple(own))
    return HeldOut(*chosen)


def _concept(picture: Picture, sizes: Sizes) -> str:
    return _drawn(picture.concept, "concept", sizes.val_concepts, sizes.tune_concepts)


def _pair(picture: Picture, sizes: Sizes) -> str:
    return _drawn(picture.key, "pair", sizes.val_pairs, sizes.tune_pairs)


def assign(pictures: Sequence[Picture], held: HeldOut, sizes: Sizes) -> dict[str, list[Picture]]:
    """The pictures of every split, and those that are in none under `LEFT_OUT`."""
    names = ("train", *(f"{use}_{of}" for use in ("val", "tune") for of in ("concept", "style", "pairs")))
    splits: dict[str, list[Picture]] = {name: [] for name in (*names, LEFT_OUT)}
    style = {family: use for use, families in (("val", held.val), ("tune", held.tune)) for family in families}
    of_held_out = list[Picture]()
    for picture in pictures:
        concept = _concept(picture, sizes)
        if picture.family in style:
            of_held_out.append(picture)
        elif concept:
            splits[f"{concept}_concept"].append(picture)
        elif pair := _pair(picture, sizes):
            splits[f"{pair}_pairs"].append(picture)
        else:
            splits["train"].append(picture)
    trained = Counter(picture.concept for picture in splits["train"])
    for picture in of_held_out:
        splits[f"{style[picture.family]}_style" if trained[picture.concept] else LEFT_OUT].append(picture)
    splits["val_common"] = [picture for picture in splits["val_style"] if trained[picture.concept] >= sizes.common]
    splits["probe_train"], splits["probe_test"] = _probe(splits, sizes)
    return splits


def _probe(splits: Mapping[str, Sequence[Picture]], sizes: Sizes) -> tuple[list[Picture], list[Picture]]:
    """Pictures of the categories with the most training pictures that are tested too, each limited."""
    tested = [picture for split in ("val_style", "val_pairs") for picture in splits[split] if picture.category]
    there = {picture.category for picture in tested}
    counts = Counter(picture.category for picture in splits["train"] if picture.category in there)
    chosen = sorted(counts, key=lambda category: (-counts[category], category))[: sizes.categories]
    train = list[Picture]()
    by_category: dict[str, list[Picture]] = defaultdict(list)
    for picture in splits["train"]:
        by_category[picture.category].append(picture)
    for category in chosen:
        train += sorted(by_category[category], key=lambda one: share("probe", one.key))[: sizes.per_category]
    return train, [picture for picture in tested if picture.category in chosen]
