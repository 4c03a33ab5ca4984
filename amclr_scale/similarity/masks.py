"""Which keys an anchor of `contrast` leaves out: those of its own group, or those that are too much like its positive.

b  anchors of this rank    B = b W  keys, over all ranks    M  extra keys

Group numbers cross ranks once, b from each for either side; nothing of size b x B is made here. Only equality matters,
so numbers are replaced by dense int32, half as many bytes to compare as ids have.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Group, all_gather, gather_numbers, group, reduce_scatter
from amclr_scale.similarity.blocks import Mask, Parts
from amclr_scale.similarity.keys import ExtraKeys

Groups = Tensor | tuple[Tensor, ...]
GroupKeys = Literal["others", "own"]
NO_IMAGE, NO_TEXT = -1, -2  # what negative numbers become: equal to nothing of the other side


@dataclass(frozen=True)
class Grouping:
    """The groups of a contrast as its caller gives them: one number of everybody, or two."""

    image: Groups | None  # (b,) int64
    text: Groups | None
    extra_images: Groups | None  # (M,)
    extra_texts: Groups | None
    keys: GroupKeys

    def sides(self, b: int, extra_images: int, extra_texts: int) -> list[list[Tensor]]:
        """Numbers of image anchors, text anchors, extra images and extra texts; none where there are no groups.

        Raises:
            ValueError: shapes or types that cannot be, or groups of one side only.
        """
        if self.keys not in ("others", "own"):
            raise ValueError(f"group_keys: expected 'others' or 'own', got {self.keys!r}")
        given = {
            "image_groups": (self.image, b, NO_IMAGE),
            "text_groups": (self.text, b, NO_TEXT),
            "extra_image_groups": (self.extra_images, extra_images, NO_IMAGE),
            "extra_text_groups": (self.extra_texts, extra_texts, NO_TEXT),
        }
        if self.image is None or self.text is None:
            some = [name for name, (groups, _, _) in given.items() if groups is not None]
            if some or self.keys == "own":
                got = ", ".join(some) or f"group_keys={self.keys!r}"
                raise ValueError(f"image_groups, text_groups: expected both, or no groups at all, got {got}")
            return []
        first = self.image if isinstance(self.image, Tensor) else self.image[0]
        count = 1 if isinstance(self.image, Tensor) else len(self.image)
        found: list[list[Tensor]] = []
        for name, (groups, n, alone) in given.items():
            parts = (groups,) if isinstance(groups, Tensor) else groups or (first.new_full((n,), -1),) * count
            if len(parts) != count or count > 2:
                raise ValueError(f"{name}: expected one tensor or a pair, the same on all sides, got {len(parts)}")
            for x in parts:
                if x.shape != (n,) or x.dtype != torch.int64 or x.device != first.device:
                    got = f"{tuple(x.shape)} {x.dtype} on {x.device}"
                    raise ValueError(f"{name}: expected ({n},) torch.int64 on {first.device}, got {got}")
            found.append([torch.where(x < 0, alone, x) for x in parts])
        return found


@dataclass(frozen=True)
class Masks:
    """A mask for each matrix of similarities, and how many keys its groups leave to an anchor."""

    images: Mask | None = None  # image anchors (b) against all texts (B)
    texts: Mask | None = None  # text anchors against all images
    extra_texts: Mask | None = None  # image anchors against extra texts (M)
    extra_images: Mask | None = None
    kept_texts: Tensor | None = None  # (b,) int64, of each image anchor; None: no groups
    kept_images: Tensor | None = None  # of each text anchor


def masks(
    grouping: Grouping,
    b: int,
    extra_images: int,
    extra_texts: int,
    *,
    exclude_positive: bool,
    limit: Tensor | None,  # (b,): similarities above it count nothing
    ranks: Group,
) -> Masks:
    """The masks of a contrast of b anchors with all ranks' keys and so many extra ones."""
    sides = grouping.sides(b, extra_images, extra_texts)
    if not sides and limit is None:
        return Masks()
    B, first = b * ranks.size, b * ranks.rank
    dense = [_dense(part, ranks) for part in zip(*sides, strict=True)]  # of all images, all texts, the extra ones
    all_images, all_texts, more_images, more_texts = (
        tuple(x[start : start + n] for x in dense)
        for start, n in ((0, B), (B, B), (2 * B, extra_images), (2 * B + extra_images, extra_texts))
    )
    image, text = (tuple(x[first : first + b] for x in every) for every in (all_images, all_texts))
    limits = None if limit is None else all_gather(limit, ranks)  # (B,)
    same = grouping.keys == "own"

    def kept(anchors: Parts, keys: Parts, extra: Parts) -> Tensor | None:
        if not dense:
            return None
        own = torch.stack([x == y for x, y in zip(image, text, strict=True)]).any(0)
        every = tuple(torch.cat(x) for x in zip(keys, extra, strict=True))
        agreeing = _agreeing(anchors, every) - own.long()
        rest = agreeing if same else len(every[0]) - 1 - agreeing
        return rest + int(not exclude_positive)

    return Masks(
        Mask(image, all_texts, same, limit, limits),
        Mask(text, all_images, same, limit, limits),
        Mask(image, more_texts, same, limit),
        Mask(text, more_images, same, limit),
        kept(image, all_texts, more_texts),
        kept(text, all_images, more_images),
    )


def own_mask(keys: ExtraKeys, limit: Tensor | None, group_keys: GroupKeys) -> Mask | None:
    """What this rank's anchors leave out of extra keys with ids of their own, which are in no group.

    Raises:
        ValueError: only the keys of an anchor's group were to count.
    """
    if group_keys == "own":
        raise ValueError("group_keys: expected 'others' with ExtraKeys, which are in no group, got 'own'")
    if keys.ids is None or keys.anchor_ids is None:
        return None if limit is None else Mask(row_limit=limit)
    if keys.there is None:
        return Mask((keys.anchor_ids,), (keys.ids,), row_limit=limit)
    absent = torch.zeros_like(keys.anchor_ids)  # what is not there is in one more group with every anchor
    return Mask((keys.anchor_ids, absent), (keys.ids, keys.there.long()), row_limit=limit)


def counted(keys: ExtraKeys) -> tuple[int, int | Tensor]:
    """How many extra keys there are, and how many of them an anchor meets: (b,) where ids leave some out."""
    there = len(keys.rows) if keys.total is None else keys.total
    if keys.sharded and keys.total is None:
        there = sum(numbers[0] for numbers in gather_numbers([there], group()))
    if keys.ids is None or keys.anchor_ids is None:
        return there, there
    if keys.same is not None:
        return there, there - keys.same
    same = _equal(all_gather(keys.anchor_ids) if keys.sharded else keys.anchor_ids, keys.ids)
    return there, there - (reduce_scatter(same) if keys.sharded else same)


def _dense(sides: Parts, ranks: Group) -> Tensor:
    """Dense numbers of all images (B,), all texts (B,) and the extra ones, end to end."""
    rows = all_gather(torch.stack(sides[:2], dim=1), ranks)  # (B, 2)
    return counted_off(torch.cat([*rows.unbind(1), *sides[2:]]))


def counted_off(x: Tensor) -> Tensor:
    """0, 1, ... as int32 in the order of size, equal where x is. Nothing waits for the device."""
    sizes, order = x.sort()
    steps = torch.zeros_like(sizes, dtype=torch.int32)
    steps[1:] = sizes[1:] != sizes[:-1]
    return torch.empty_like(steps).scatter_(0, order, steps.cumsum(0, dtype=torch.int32))


def _agreeing(anchors: Parts, keys: Parts) -> Tensor:
    """How many keys have one of an anchor's numbers, (b,) int64."""
    found = sum(_equal(x, y) for x, y in zip(anchors, keys, strict=True))
    if len(anchors) == 2:  # those that have both were counted twice
        size = 2**31
        pairs = counted_off(torch.cat([x[0].long() * size + x[1] for x in (anchors, keys)]))
        found = found - _equal(pairs[: len(anchors[0])], pairs[len(anchors[0]) :])
    assert isinstance(found, Tensor)
    return found


def _equal(anchors: Tensor, keys: Tensor) -> Tensor:
    """How many keys have an anchor's number, (b,) int64."""
    ordered = keys.sort().values
    return torch.searchsorted(ordered, anchors, right=True) - torch.searchsorted(ordered, anchors)
