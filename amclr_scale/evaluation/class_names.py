"""Which name a class has in prompts, and which of the names a sample's label means.

Labels are numbers (shards, CIFAR) or words (folders, a field of the JSON). A data set may have a list of names of its
own, in the order of its numbers; `evaluation.class_names` gives another list, whose order nobody has promised. Its
names are given to the classes by the first of these rules that all classes meet:

    pairs     lines of the file are `CLASS name`, the class as the data set writes it, then a tab or a space
    names     every class occurs in the list (case, and underscores for spaces, do not count)
    numbers   every class is a number: a position in the list, which begins with 0
    wnids     every class is a WordNet number of ImageNet-1k's (n01440764), the list has its 1,000 names
    order     the data set has names of its own for numbered classes, and the list has as many: the same, otherwise said

Anything else is refused. Underscores in names become spaces in prompts.
"""

import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale.errors import UserError

log = logging.getLogger(__name__)
_KEY = "evaluation.class_names"
_WNID = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Classes:
    """The classes of a split.

    Attributes:
        names: as prompts say them.
        labels: (n,) int64, positions in names, one per sample.
        rule: how they were found; "" where they are the data set's own.
    """

    names: list[str]
    labels: Tensor
    rule: str = ""


def name_classes(split: str, labels: Sequence[Any], own: list[str] | None, given: str | None) -> Classes | None:
    """The classes of a split, or None where nobody names them.

    Args:
        split: its name, for messages.
        labels: of every sample, numbers or words.
        own: the data set's names: of numbers in their order; the words themselves.
        given: `evaluation.class_names`.

    Raises:
        UserError: a label has no name, or a given list does not say whose its names are.
    """
    words = {label for label in labels if isinstance(label, str)}
    if given is None:
        if own is None:
            return None
        places: dict[Any, int] = {name: place for place, name in enumerate(own)}
        places |= {place: place for place in range(len(own))}
        if words and all(map(_WNID.fullmatch, words)):
            log.warning("%s: %s: prompts will say the classes' WordNet numbers; names: %s=imagenet", _KEY, split, _KEY)
        return Classes(_spoken(own), _placed(split, labels, places, len(own)))
    lines = listed(given)
    known = {label: label if isinstance(label, str) else _own_name(own, label) for label in dict.fromkeys(labels)}
    found = _match(split, known, own, lines, given)
    return Classes(_spoken(found.names), _placed(split, labels, found.places, len(found.names)), found.rule)


@dataclass(frozen=True)
class _Found:
    names: list[str]
    places: Mapping[Any, int]  # of labels
    rule: str


def _match(split: str, known: Mapping[Any, str], own: list[str] | None, lines: list[str], given: str) -> _Found:
    """The first rule that all classes meet. `known`: what the data set calls each label."""
    pairs = dict(_pair(line) for line in lines)
    if len(pairs) == len(lines) and all(name in pairs and pairs[name] for name in known.values()):
        order = {folder: place for place, folder in enumerate(pairs)}
        return _Found(list(pairs.values()), {label: order[name] for label, name in known.items()}, "by its pairs")
    count = Counter(map(_plain, lines))
    if all(count[_plain(name)] == 1 for name in known.values()):
        by_name = {_plain(line): place for place, line in enumerate(lines)}
        return _Found(lines, {label: by_name[_plain(name)] for label, name in known.items()}, "by name")
    if own is not None and not all(isinstance(label, str) for label in known):
        if len(own) != len(lines):
            raise UserError(f"{_KEY}: {split} has {len(own)} classes, {given} {len(lines)}")
        return _Found(lines, {n: n for n in range(len(lines))}, "in the order of the data set's own names")
    if all(name.isdecimal() for name in known.values()):
        numbers = {label: int(name) for label, name in known.items()}
        if len(set(numbers.values())) == len(numbers) and max(numbers.values()) < len(lines):
            return _Found(lines, numbers, "by number")
        last = len(lines) - 1
        why = f"numbers up to {max(numbers.values())}, and a list of {last + 1} names has the numbers 0 to {last}"
    elif all(map(_WNID.fullmatch, known.values())) and len(lines) == len(_wnids()):
        order = {wnid: place for place, wnid in enumerate(_wnids())}
        strange = next((name for name in known.values() if name not in order), None)
        if strange is None:
            return _Found(lines, {label: order[name] for label, name in known.items()}, "by WordNet number")
        why = f"{strange}, which is none of ImageNet-1k's 1,000 WordNet numbers"
    else:
        strange = next(name for name in known.values() if count[_plain(name)] != 1)
        twice = ", twice" if count[_plain(strange)] > 1 else ""
        why = f"{strange!r}, which {'stands there' + twice if twice else 'is not among the names'}"
    raise UserError(
        f"{_KEY}: {split}: expected names that say whose they are: the classes' own names, numbers from 0 on, or lines "
        f"of `CLASS name`; got {why} ({given}: {_some(lines)}; classes: {_some(list(known.values()))})"
    )


def listed(given: str) -> list[str]:
    """The names that `evaluation.class_names` gives.

    Raises:
        UserError: it is neither imagenet nor a file with names.
    """
    if given == "imagenet":
        return list(imagenet_metadata(_KEY).IMAGENET_CLASSNAMES)
    names = lines_of(Path(given).expanduser())
    if not names:
        raise UserError(f"{_KEY}: expected imagenet or a file with one name a line, got {given}")
    return names


def lines_of(path: Path) -> list[str]:
    """The lines of a file that are not blank; none without a file."""
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()] if path.is_file() else []


def imagenet_metadata(key: str) -> Any:
    """open_clip's names and prompts for ImageNet.

    Raises:
        UserError: open_clip is not installed; names the key.
    """
    from amclr_scale.torchvision_ops import import_torchvision

    try:
        import_torchvision()
        from open_clip import zero_shot_metadata
    except ImportError as error:
        raise UserError(f"{key}: imagenet needs open_clip_torch: pip install open_clip_torch ({error})") from error
    return zero_shot_metadata


def _wnids() -> list[str]:
    """ImageNet-1k's, in the order of its class numbers."""
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def _own_name(own: list[str] | None, label: int) -> str:
    return own[label] if own is not None and 0 <= label < len(own) else str(label)


def _pair(line: str) -> tuple[str, str]:
    first, _, rest = line.partition("\t") if "\t" in line else line.partition(" ")
    return first.strip(), rest.strip()


def _plain(name: str) -> str:
    return name.replace("_", " ").casefold()


def _spoken(names: list[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def _placed(split: str, labels: Sequence[Any], places: Mapping[Any, int], classes: int) -> Tensor:
    for sample, label in enumerate(labels):
        if label not in places:
            raise UserError(
                f"evaluation.classes: {split}: sample {sample} has the class {label!r}, which is none of the {classes} "
                "class names"
            )
    return torch.tensor([places[label] for label in labels])


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
