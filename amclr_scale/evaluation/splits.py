"""What `evaluation.splits` may name, opened: images with captions, labels or both, and the names of their classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from amclr_scale.config.schema import Data, Evaluation
from amclr_scale.data.evaluation_split import EvaluationSplit, class_names
from amclr_scale.data.formats.annotation_files import read_json
from amclr_scale.data.formats.picture_files import find_pictures
from amclr_scale.data.reading import Reading, reading_of, square_view
from amclr_scale.data.sources import embedded_splits, shards_in
from amclr_scale.errors import UserError
from amclr_scale.evaluation.cifar import CifarFiles, find_cifar
from amclr_scale.evaluation.class_names import imagenet_metadata, lines_of, name_classes
from amclr_scale.evaluation.image_files import (
    ImageFiles,
    Item,
    annotations,
    holds_shards,
    is_picture_folder,
    picture_folder,
)
from amclr_scale.evaluation.shares import share
from amclr_scale.evaluation.zero_shot import prompts
from amclr_scale.types import Batch

_KEY = "evaluation.splits"

EMOJI_TEMPLATES = ["{}", "an emoji of {}", "a picture of {}", "{} icon", "a drawing of {}"]
PHOTO_TEMPLATES = ["a photo of a {}."]
PROMPTS_SHOWN = 3


class Split(Protocol):
    """Held-out samples, of which each rank reads its share."""

    name: str
    reading: Reading
    num_samples: int
    caption_lists: list[list[str]]  # of all samples
    labels: list[Any] | None
    image_ids: Tensor  # (n,) samples that show the same image have the same number

    def batches(self, batch_size: int) -> Iterator[Batch]: ...


@dataclass(frozen=True)
class Task:
    """A split, and what can be measured on it."""

    name: str
    split: Split
    retrieval: bool
    class_names: list[str]  # empty: no classification
    labels: Tensor  # (n,) int64, positions in class_names; empty without them
    templates: list[str]
    class_rule: str = ""  # how `evaluation.class_names` gave them their names

    def prompts_in_words(self) -> str:
        """How many classes there are, and the first prompts that stand for them; "" without classes."""
        if not self.class_names:
            return ""
        first = prompts(self.class_names[:PROMPTS_SHOWN], self.templates[:1])
        beside = f", each in {len(self.templates)} prompts" if len(self.templates) > 1 else ""
        missing = len(self.class_names) - len(torch.unique(self.labels))
        without = f" ({missing:,} without images)" if missing else ""
        rule = f", named {self.class_rule}" if self.class_rule else ""
        return f"{self.name}: {len(self.class_names):,} classes{without}{rule}{beside}: {' | '.join(first)}"

    def pairs_here(self) -> int:
        """Images, and captions if there is retrieval, that this rank encodes."""
        captions = sum(map(len, self.split.caption_lists)) if self.retrieval else 0
        return len(share(self.split.num_samples)) + len(share(captions))


@dataclass(frozen=True)
class NamedSplit:
    """One of `evaluation.splits` before it is known what it is.

    Attributes:
        given: as it is named: PATH, or PATH#PART of what holds several; or what else `data.train` may name.
        part: PART, or `test`.
        classes: where a sample's class is.
        reading: how the model reads pictures and captions.
        begun: a run that goes on has measured on it (`open_index`).
    """

    given: str
    path: Path
    part: str
    data: Data
    options: Evaluation
    classes: str | None
    reading: Reading
    rank: int
    world_size: int
    begun: bool = False

    def of_files(self, items: list[Item]) -> ImageFiles:
        """A split of image files."""
        cleaned = [item.cleaned() for item in items] if self.options.clean_captions else items
        return ImageFiles(self.given, self.data, cleaned, self.reading)

    def of_shards(self, name: str, data: Data, classes: str | None) -> EvaluationSplit:
        """A split of shards."""
        return EvaluationSplit(
            name, data, rank=self.rank, world_size=self.world_size, classes=classes, reading=self.reading,
            clean=self.options.clean_captions, begun=self.begun,
        )  # fmt: skip


@dataclass(frozen=True)
class Opened:
    """What a format has found.

    Attributes:
        retrieval: whether every sample has a caption.
        class_names: names of the classes behind the split's labels; None: it has none.
        templates: prompts of its own.
    """

    split: Split
    retrieval: bool
    class_names: list[str] | None = None
    templates: list[str] = field(default_factory=list)


def open_task(
    given: str,
    data: Data,
    options: Evaluation,
    *,
    rank: int,
    world_size: int,
    name: str = "",
    classes: str | None = None,
    reading: Reading | None = None,
    begun: bool = False,
) -> Task:
    """Open one of `evaluation.splits`, whatever its format. All ranks call it.

    Args:
        given: its path, or what else names it.
        name: what its numbers are called; default: the path.
        classes: overrides options.classes.
        reading: how the model reads pictures and captions; None: as `data` and `options` say.
        begun: a run that goes on has measured on it (`open_index`).

    Raises:
        UserError: it is none of the formats, or something in it cannot be used.
    """
    squash = options.resize == "squash"
    if reading is None:
        reading = reading_of(data, squash=squash)
    elif squash:
        reading = replace(reading, view=square_view(data.image_size, squash=True))
    file, _, part = given.partition("#")
    named = NamedSplit(
        given, Path(file).expanduser(), part or "test", data, options, classes or options.classes, reading, rank,
        world_size, begun,
    )  # fmt: skip
    found = next((opened for one in SPLIT_FORMATS.values() if (opened := one(named))), None) or _shards(named)
    split, names = found.split, found.class_names
    known = name_classes(given, split.labels, names, options.class_names) if split.labels is not None else None
    final, labels = (known.names, known.labels) if known else ([], torch.empty(0))
    own = found.templates or (EMOJI_TEMPLATES if given in embedded_splits() else PHOTO_TEMPLATES)
    chosen = _templates(options.templates) or own
    prompts(final[:1] or ["x"], chosen)
    if not found.retrieval and not final:
        raise UserError(f"{_KEY}: {given}: pictures without captions and without classes: there is nothing to measure")
    return Task(name or given, split, found.retrieval, final, labels, chosen, known.rule if known else "")


def _annotations(named: NamedSplit) -> Opened | None:
    path = named.path
    if path.suffix not in (".json", ".jsonl") or not path.is_file() or _is_index(path):
        return None
    root = Path(named.options.image_root).expanduser() if named.options.image_root else path.parent
    return Opened(named.of_files(annotations(named.given, read_json(path, _KEY), root, named.part)), retrieval=True)


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"shardlist"' in file.read(4096)


def _clip_benchmark(named: NamedSplit) -> Opened | None:
    """PATH/test/*.tar with .cls or .txt; beside test: classnames.txt, templates, dataset_type.txt."""
    root = named.path
    if not (root / "test").is_dir() or not shards_in(root / "test"):
        return None
    kind = root / "dataset_type.txt"
    retrieval = kind.is_file() and kind.read_text().strip() == "retrieval"
    member = "txt" if retrieval else "cls"  # without captions the class number stands in for one; it is never encoded
    data = named.data.model_copy(update={"caption": member})
    split = named.of_shards(str(root / "test"), data, None if retrieval else "cls")
    lines = {file: lines_of(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt")}
    if not retrieval and not lines["classnames.txt"]:
        raise UserError(f"{_KEY}: {named.given}: expected a classnames.txt in the folder, one name a line, found none")
    return Opened(split, retrieval, lines["classnames.txt"] or None, lines["zeroshot_classification_templates.txt"])


def _cifar(named: NamedSplit) -> Opened | None:
    folder = find_cifar(named.path) if named.path.is_dir() else None
    if folder is None:
        return None
    split = CifarFiles(named.given, folder, named.reading, named.part)
    return Opened(split, retrieval=False, class_names=split.class_names)


def _pictures(named: NamedSplit) -> Opened | None:
    if not is_picture_folder(named.path):
        told = "" if not named.path.is_dir() or holds_shards(named.path) else find_pictures(named.path).told()
        if told:
            raise UserError(f"{_KEY}: {named.given}: expected pictures or shards, found neither; {told}")
        return None
    split = named.of_files(picture_folder(named.path))
    names = sorted({str(label) for label in split.labels or []})
    return Opened(split, all(split.caption_lists), names or None)


def _shards(named: NamedSplit) -> Opened:
    split = named.of_shards(named.given, named.data, named.classes)
    return Opened(split, True, _own_names(named, split))


# Each opens a split that is its own, and gives None for any other; what none of them takes is read as shards. An entry
# adds a format: tests/commands/additions/split_format.py is one.
SPLIT_FORMATS: dict[str, Callable[[NamedSplit], Opened | None]] = {
    "annotations": _annotations,
    "CLIP_benchmark": _clip_benchmark,
    "CIFAR": _cifar,
    "pictures": _pictures,
}


def _own_names(named: NamedSplit, split: EvaluationSplit) -> list[str] | None:
    """The names that shards have for their classes; of numbers that get others they may be missing."""
    replaced = named.options.class_names
    if named.classes is None or (replaced and any(isinstance(label, str) for label in split.labels or [])):
        return None
    try:
        return class_names(named.given, named.data, named.classes, begun=named.begun)
    except UserError:
        if replaced is None:
            raise
        return None


def _templates(templates: list[str] | str | None) -> list[str]:
    if templates is None or isinstance(templates, list):
        if templates == []:
            raise UserError("evaluation.templates: expected at least one prompt such as 'a photo of a {}', got none")
        return templates or []
    if templates == "imagenet":
        return [template("{}") for template in imagenet_metadata("evaluation.templates").OPENAI_IMAGENET_TEMPLATES]
    found = lines_of(Path(templates).expanduser())
    if not found:
        raise UserError(
            f"evaluation.templates: expected a list, imagenet or a file with one prompt a line, got {templates}"
        )
    return found
