"""What `evaluation.splits` may name, opened: images with captions, labels or both, and the names of their classes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from amclr_scale.config.schema import Data, Evaluation
from amclr_scale.data.evaluation_split import EvaluationSplit, class_names
from amclr_scale.data.formats.annotation_files import read_json
from amclr_scale.data.sources import embedded_splits
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.errors import UserError
from amclr_scale.evaluation.cifar import CifarFiles, find_cifar
from amclr_scale.evaluation.class_names import imagenet_metadata, lines_of, name_classes
from amclr_scale.evaluation.image_files import ImageFiles, annotations, is_picture_folder, picture_folder
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
    data: Data
    tokenizer: Tokenizer
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


def open_task(
    given: str,
    data: Data,
    options: Evaluation,
    *,
    rank: int,
    world_size: int,
    name: str = "",
    classes: str | None = None,
) -> Task:
    """Open one of `evaluation.splits`, whatever its format. All ranks call it.

    Args:
        given: its path, or what else names it.
        name: what its numbers are called; default: the path.
        classes: overrides options.classes.

    Raises:
        UserError: it is none of the formats, or something in it cannot be used.
    """
    classes = classes or options.classes
    file, _, part = given.partition("#")
    path = Path(file).expanduser()
    names: list[str] | None = None
    templates: list[str] = EMOJI_TEMPLATES if given in embedded_splits() else PHOTO_TEMPLATES
    squash, clean = options.resize == "squash", options.clean_captions
    sharded = partial(EvaluationSplit, rank=rank, world_size=world_size, squash=squash, clean=clean)
    split: Split
    if path.suffix in (".json", ".jsonl") and path.is_file() and not _is_index(path):
        root = Path(options.image_root).expanduser() if options.image_root else path.parent
        items = annotations(given, read_json(path, _KEY), root, part or "test")
        split = ImageFiles(given, data, [item.cleaned() for item in items] if clean else items, squash=squash)
        retrieval = True
    elif path.is_dir() and (path / "test").is_dir() and list((path / "test").glob("*.tar")):
        retrieval, split, names, own = _clip_benchmark(given, path, data, sharded)
        templates = own or templates
    elif path.is_dir() and (folder := find_cifar(path)):
        split = found = CifarFiles(given, folder, data, part or "test")
        retrieval, names = False, found.class_names
    elif is_picture_folder(path):
        items = picture_folder(path)
        split = ImageFiles(given, data, [item.cleaned() for item in items] if clean else items, squash=squash)
        retrieval, names = all(split.caption_lists), sorted({str(label) for label in split.labels or []}) or None
    else:
        split = found_shards = sharded(given, data, classes=classes)
        retrieval = True
        names = _own_names(given, data, classes, found_shards, options.class_names)
    known = name_classes(given, split.labels, names, options.class_names) if split.labels is not None else None
    final, labels = (known.names, known.labels) if known else ([], torch.empty(0))
    chosen = _templates(options.templates) or templates
    prompts(final[:1] or ["x"], chosen)
    if not retrieval and not final:
        raise UserError(f"{_KEY}: {given}: pictures without captions and without classes: there is nothing to measure")
    return Task(name or given, split, retrieval, final, labels, chosen, known.rule if known else "")


def _is_index(path: Path) -> bool:
    with path.open("rb") as file:
        return b'"shardlist"' in file.read(4096)


def _clip_benchmark(
    name: str, root: Path, data: Data, sharded: Callable[..., EvaluationSplit]
) -> tuple[bool, Split, list[str] | None, list[str]]:
    """Open root/test/*.tar with .cls or .txt; beside test: classnames.txt, templates, dataset_type.txt."""
    kind = root / "dataset_type.txt"
    retrieval = kind.is_file() and kind.read_text().strip() == "retrieval"
    member = "txt" if retrieval else "cls"  # without captions the class number stands in for one; it is never encoded
    split = sharded(
        str(root / "test"), data.model_copy(update={"caption": member}), classes=None if retrieval else "cls"
    )
    lines = {file: lines_of(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt")}
    if not retrieval and not lines["classnames.txt"]:
        raise UserError(f"{_KEY}: {name}: expected a classnames.txt in the folder, one name a line, found none")
    return retrieval, split, lines["classnames.txt"] or None, lines["zeroshot_classification_templates.txt"]


def _own_names(
    given: str, data: Data, classes: str | None, split: EvaluationSplit, replaced: str | None
) -> list[str] | None:
    """The names that shards have for their classes; of numbers that get others (`replaced`) they may be missing."""
    if classes is None or (replaced and any(isinstance(label, str) for label in split.labels or [])):
        return None
    try:
        return class_names(given, data, classes)
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
