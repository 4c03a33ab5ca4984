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
from amclr_scale.evaluation.image_files import ImageFiles, annotations, is_picture_folder, picture_folder
from amclr_scale.evaluation.shares import share
from amclr_scale.evaluation.zero_shot import prompts
from amclr_scale.types import Batch

_KEY = "evaluation.splits"

EMOJI_TEMPLATES = ["{}", "an emoji of {}", "a picture of {}", "{} icon", "a drawing of {}"]
PHOTO_TEMPLATES = ["a photo of a {}."]


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
        split = sharded(given, data, classes=classes)
        retrieval = True
        if classes is not None and options.class_names is None:
            names = class_names(given, data, classes)
    listed = _class_names(options.class_names, split) if split.labels is not None else None
    labels = _numbered(split, names or listed) if split.labels is not None and (names or listed) else torch.empty(0)
    final = listed or names or []
    if listed and names and len(listed) != len(names):
        raise UserError(
            f"evaluation.class_names: {given} has {len(names)} classes, {options.class_names} {len(listed)}"
        )
    chosen = _templates(options.templates) or templates
    prompts(final[:1] or ["x"], chosen)
    if not retrieval and not final:
        raise UserError(f"{_KEY}: {given}: pictures without captions and without classes: there is nothing to measure")
    return Task(name or given, split, retrieval, final, labels, chosen)


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
    lines = {file: _lines(root / file) for file in ("classnames.txt", "zeroshot_classification_templates.txt")}
    if not retrieval and not lines["classnames.txt"]:
        raise UserError(f"{_KEY}: {name}: expected a classnames.txt in the folder, one name a line, found none")
    return retrieval, split, lines["classnames.txt"] or None, lines["zeroshot_classification_templates.txt"]


def _lines(path: Path) -> list[str]:
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()] if path.is_file() else []


def _class_names(named: str | None, split: Split) -> list[str] | None:
    if named is None:
        return None
    if named == "imagenet":
        return list(_metadata("evaluation.class_names").IMAGENET_CLASSNAMES)
    names = _lines(Path(named).expanduser())
    if not names:
        raise UserError(
            f"evaluation.class_names: expected imagenet or a file with one name a line, got {named} for {split.name}"
        )
    return names


def _templates(templates: list[str] | str | None) -> list[str]:
    if templates is None or isinstance(templates, list):
        if templates == []:
            raise UserError("evaluation.templates: expected at least one prompt such as 'a photo of a {}', got none")
        return templates or []
    if templates == "imagenet":
        return [template("{}") for template in _metadata("evaluation.templates").OPENAI_IMAGENET_TEMPLATES]
    found = _lines(Path(templates).expanduser())
    if not found:
        raise UserError(
            f"evaluation.templates: expected a list, imagenet or a file with one prompt a line, got {templates}"
        )
    return found


def _metadata(key: str) -> Any:
    from amclr_scale.torchvision_ops import import_torchvision

    try:
        import_torchvision()
        from open_clip import zero_shot_metadata
    except ImportError as error:
        raise UserError(f"{key}: imagenet needs open_clip_torch: pip install open_clip_torch ({error})") from error
    return zero_shot_metadata


def _numbered(split: Split, names: list[str] | None) -> Tensor:
    """Every sample's class as a position in `names`.

    Raises:
        UserError: a label that is not there.
    """
    assert split.labels is not None
    assert names is not None
    places: dict[Any, int] = {name: place for place, name in enumerate(names)}
    found = [places.get(label, -1) if isinstance(label, str) else label for label in split.labels]
    for sample, place in enumerate(found):
        if not 0 <= place < len(names):
            raise UserError(
                f"evaluation.classes: {split.name}: sample {sample} has the class {split.labels[sample]!r}, which is "
                f"none of the {len(names)} class names"
            )
    return torch.tensor(found)
