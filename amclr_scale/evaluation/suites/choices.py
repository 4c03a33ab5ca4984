"""A picture, its caption and wrong ones: SugarCrepe and ARO.

    SugarCrepe   {"0": {"filename", "caption", "negative_caption"}, ...}
    VG-Relation, VG-Attribution
                 [{"image_path", "true_caption", "false_caption", "bbox_x", "bbox_y", "bbox_w", "bbox_h",
                   "relation_name" or "attributes": [a, b]}, ...]: the part of the picture inside the box is seen
    COCO-Order, Flickr30k-Order
                 [{"image", "caption_options": [right, wrong, ...]}, ...]: the list `test_cases` of the authors' data
                 sets, saved as JSON; they draw the wrong ones at random, so models are compared on one saved file

A case is right where its caption scores higher than every wrong one; ties count against the model. Macro accuracies of
ARO are means over kinds of cases, as the authors compute them: relations without those they leave out, and pairs of
attributes that have at least 25 cases.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from amclr_scale.data.formats.annotation_files import read_json
from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.numbers import mean_of_groups, number
from amclr_scale.evaluation.suites.aro_relations import LEFT_OUT
from amclr_scale.evaluation.suites.opened import Measured, Opened, Place
from amclr_scale.evaluation.suites.pairs import Box, Pairs, above, entries, entry, scores

FEWEST = 25  # cases of a pair of attributes
_COCO = ("", "images", "val2017", "coco/val2017", "coco/images/val2017", "images/val2017")
_ORDER = ("", "images", "coco", "flickr30k", "flickr30k-images", "coco/images")


@dataclass(frozen=True)
class Case:
    """One picture with its caption and wrong ones, by their numbers in `Pairs`."""

    picture: int
    right: int
    wrong: list[int]
    kind: str = ""


def open_sugarcrepe(place: Place) -> Opened:
    """One of SugarCrepe's seven files."""
    pairs, cases = Pairs(place, _COCO), []
    for key, found in entries(place, read_json(place.path, "--data")):
        name, right, wrong = entry(place, key, found, filename=str, caption=str, negative_caption=str)
        cases.append(Case(pairs.picture(name), pairs.text(right), [pairs.text(wrong)]))
    return _opened(pairs, cases)


def open_aro_order(place: Place) -> Opened:
    """COCO-Order or Flickr30k-Order."""
    pairs, cases = Pairs(place, _ORDER), []
    for key, found in entries(place, read_json(place.path, "--data")):
        name, options = entry(place, key, found, image=str, caption_options=list)
        if len(options) < 2 or not all(isinstance(one, str) for one in options):
            raise UserError(
                f"--data: {place.one.name}: entry {key} of {place.path}: expected caption_options with the right "
                f"caption and wrong ones behind it, got {str(options)[:200]}"
            )
        right, *wrong = (pairs.text(one) for one in options)
        cases.append(Case(pairs.picture(name), right, wrong))
    return _opened(pairs, cases)


def open_aro_relation(place: Place) -> Opened:
    """VG-Relation."""
    pairs, cases = Pairs(place, ("images", "")), []
    for key, found in entries(place, read_json(place.path, "--data")):
        (relation,) = entry(place, key, found, relation_name=str)
        cases.append(_visual_genome(pairs, key, found, relation))
    kept = {case.kind for case in cases} - LEFT_OUT
    if not kept:
        raise UserError(
            f"--data: {place.one.name}: {place.path}: expected relations that the authors count, found none"
        )
    return _opened(pairs, cases, kept)


def open_aro_attribution(place: Place) -> Opened:
    """VG-Attribution."""
    pairs, cases = Pairs(place, ("images", "")), []
    for key, found in entries(place, read_json(place.path, "--data")):
        (attributes,) = entry(place, key, found, attributes=list)
        cases.append(_visual_genome(pairs, key, found, "_".join(map(str, attributes[:2]))))
    kept = {kind for kind, count in Counter(case.kind for case in cases).items() if count >= FEWEST}
    if not kept:
        raise UserError(
            f"--data: {place.one.name}: {place.path}: expected pairs of attributes with at least {FEWEST} cases, which "
            "are those that the authors count, found none"
        )
    return _opened(pairs, cases, kept)


def _visual_genome(pairs: Pairs, key: object, found: object, kind: str) -> Case:
    place, numeric = pairs.place, (int, float)
    name, right, wrong, x, y, w, h = entry(
        place, key, found, image_path=str, true_caption=str, false_caption=str, bbox_x=numeric, bbox_y=numeric,
        bbox_w=numeric, bbox_h=numeric,
    )  # fmt: skip
    finite = all(map(isfinite, (x, y, x + w, y + h)))  # JSON as Python reads it knows NaN and Infinity
    box: Box = (int(x), int(y), int(x + w), int(y + h)) if finite else (0, 0, 0, 0)
    if not 0 < (box[2] - box[0]) * (box[3] - box[1]) <= place.data.max_image_pixels or box[2] <= box[0]:
        raise UserError(
            f"--data: {place.one.name}: entry {key} of {place.path}: expected a box with pixels in it, got "
            f"{(x, y, w, h)}"
        )
    return Case(pairs.picture(name, box), pairs.text(right), [pairs.text(wrong)], kind)


def _opened(pairs: Pairs, cases: list[Case], kept: set[str] | None = None) -> Opened:
    def measure(encode: Encode) -> Measured:
        hits = won(*pairs.encode(encode), cases)
        chances = torch.tensor([1 / (1 + len(case.wrong)) for case in cases], dtype=torch.float64)
        pictures = torch.unique(torch.tensor([case.picture for case in cases]), return_inverse=True)[1]
        numbers = {"right": number(hits, clusters=pictures, chance=float(chances.mean()))}
        if kept is not None:
            sizes = Counter(case.kind for case in cases)
            places = {kind: place for place, kind in enumerate(sizes)}
            of_kind = torch.tensor([places[case.kind] for case in cases])
            counts = torch.tensor([case.kind in kept for case in cases])
            chance = mean_of_groups(chances, of_kind, kept=counts).value
            numbers["macro_right"] = mean_of_groups(hits, of_kind, kept=counts, clusters=pictures, chance=chance)
        return numbers, {} if kept is None else {"kinds": float(len(kept))}

    return Opened(pairs.files(), len(cases), pairs.encoded_here(), measure)


def won(image: Tensor, text: Tensor, cases: Sequence[Case]) -> Tensor:
    """Which cases are right: (n,) float64 of 0 and 1.

    Args:
        image: (P, D), unit length.
        text: (T, D), unit length.
    """
    flat = [(number, case.picture, wrong) for number, case in enumerate(cases) for wrong in case.wrong]
    right = scores(image, text, [case.picture for case in cases], [case.right for case in cases])
    owners = torch.tensor([number for number, _, _ in flat])
    wrong = scores(image, text, [picture for _, picture, _ in flat], [words for _, _, words in flat])
    lost = torch.bincount(owners, weights=(~above(right[owners], wrong)).double(), minlength=len(cases))
    return (lost == 0).double()
