"""Winoground: two captions of the same words, two pictures, and whether a model knows which belongs to which.

Thrush et al., "Winoground: Probing Vision and Language Models for Visio-Linguistic Compositionality", CVPR 2022,
arXiv:2204.03162. With the score s(c, i) of caption c and picture i, an example is right

    text score     s(c0, i0) > s(c1, i0)  and  s(c1, i1) > s(c0, i1)        chance 1/4
    image score    s(c0, i0) > s(c0, i1)  and  s(c1, i1) > s(c1, i0)        chance 1/4
    group score    both                                                     chance 1/6

examples.jsonl has on each line {"image_0", "image_1", "caption_0", "caption_1", ["collapsed_tag"]}; pictures are called
so, with .png or .jpg. Ties count against the model. The three scores of each tag are measured too.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from amclr_scale.data.formats.annotation_files import read_json
from amclr_scale.errors import UserError
from amclr_scale.evaluation.encode import Encode
from amclr_scale.evaluation.numbers import number
from amclr_scale.evaluation.suites.opened import Measured, Opened, Place
from amclr_scale.evaluation.suites.pairs import Pairs, above, entries, entry, scores

CHANCE = {"text_score": 1 / 4, "image_score": 1 / 4, "group_score": 1 / 6}
_FOLDERS = ("images", "data/images", "")
Example = tuple[tuple[int, int], tuple[int, int]]  # numbers of its two captions, and of its two pictures


def open_winoground(place: Place) -> Opened:
    """The 400 examples, or as many as the file has."""
    pairs, examples, tags = Pairs(place, _FOLDERS), list[Example](), list[str]()
    suffix = _suffix(place)
    for key, found in entries(place, read_json(place.path, "--data")):
        c0, c1, i0, i1 = entry(place, key, found, caption_0=str, caption_1=str, image_0=str, image_1=str)
        pictures = (pairs.picture(_called(i0, suffix)), pairs.picture(_called(i1, suffix)))
        examples.append(((pairs.text(c0), pairs.text(c1)), pictures))
        tags.append(str(found.get("collapsed_tag") or ""))

    def measure(encode: Encode) -> Measured:
        right = judged(*pairs.encode(encode), examples)
        numbers = {name: number(hits, chance=CHANCE[name]) for name, hits in right.items()}
        for tag in sorted({tag for tag in tags if tag}):
            mine = torch.tensor([one == tag for one in tags])
            numbers |= {f"{name}_{tag}": number(hits[mine], chance=CHANCE[name]) for name, hits in right.items()}
        return numbers, {}

    return Opened(pairs.files(), len(examples), pairs.encoded_here(), measure)


def _suffix(place: Place) -> str:
    """What the names of pictures lack: as the first picture that is there has it.

    Raises:
        UserError: images.zip is still packed.
    """
    given = place.options.image_root
    folders = [Path(given).expanduser()] if given else [place.path.parent / folder for folder in _FOLDERS]
    for folder in folders:
        for suffix in (".png", ".jpg"):
            if next(folder.glob(f"ex_*_img_*{suffix}"), None) is not None:
                return suffix
    packed = next((place.path.parent / name for name in ("images.zip",) if (place.path.parent / name).is_file()), None)
    if packed is not None:
        raise UserError(
            f"--data: {place.one.name}: expected the pictures of {packed} unpacked beside it: unzip it there"
        )
    return ".png"


def _called(name: str, suffix: str) -> str:
    return name if Path(name).suffix else name + suffix


def judged(image: Tensor, text: Tensor, examples: Sequence[Example]) -> dict[str, Tensor]:
    """Which examples are right by each of the three scores: (n,) float64 of 0 and 1.

    Args:
        image: (P, D), unit length.
        text: (T, D), unit length.
    """
    s = {
        (c, i): scores(image, text, [pictures[i] for _, pictures in examples], [words[c] for words, _ in examples])
        for c in (0, 1)
        for i in (0, 1)
    }
    by_text = above(s[0, 0], s[1, 0]) & above(s[1, 1], s[0, 1])
    by_image = above(s[0, 0], s[0, 1]) & above(s[1, 1], s[1, 0])
    right = {"text_score": by_text, "image_score": by_image, "group_score": by_text & by_image}
    return {name: hits.double() for name, hits in right.items()}
