"""Benchmarks that come as image files: annotations of pairs, or one folder per class.

    Karpathy's JSON     {"images": [{"split", "filename", ["filepath"], ["imgid"], "sentences": [{"raw"}]}]}
                        Karpathy & Fei-Fei, CVPR 2015, arXiv:1412.2306: COCO and Flickr30k, split `test` by custom
    COCO's JSON         captions_val2017.json, all of it
    a JSON list         [{"image", "caption": one or several, ["image_id"], ["negatives"]}]: ALBEF's coco_test.json,
                        flickr30k_test.json and the like
    folders             CLASS/*.jpg or CLASS/images/*.jpg, classes in the order of the folders' names; and pictures with
                        a .txt of the same name beside each

Images are seen as those of shards are.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale.config.schema import Data
from amclr_scale.data.decoding import BadSampleError, Sample, decode
from amclr_scale.data.formats.annotation_files import entries, kind_of
from amclr_scale.data.formats.picture_files import Classes, FoundPictures, find_pictures, holds_picture, is_hidden
from amclr_scale.data.reading import Reading
from amclr_scale.data.sources import INDEX_NAMES, shards_in
from amclr_scale.data.text_views import clean_caption
from amclr_scale.errors import UserError
from amclr_scale.evaluation.shares import share
from amclr_scale.types import Batch

_KEY = "evaluation.splits"
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Item:
    """One image file and what is known about it."""

    path: Path
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    image_id: Any = None  # images with the same one are the same image; None: those with the same path are
    negatives: dict[str, list[str]] = field(default_factory=dict)  # wrong captions by what is wrong with them
    box: tuple[int, int, int, int] | None = None  # left, top, right, bottom, in pixels: what of the picture is seen

    def cleaned(self) -> "Item":
        """With captions as ALBEF cleans them."""
        negatives = {kind: [clean_caption(text) for text in texts] for kind, texts in self.negatives.items()}
        return replace(self, captions=[clean_caption(text) for text in self.captions], negatives=negatives)


class ImageFiles:
    """A split made of image files, with the interface of `EvaluationSplit`."""

    def __init__(self, name: str, data: Data, items: list[Item], reading: Reading):
        if not items:
            raise UserError(f"{_KEY}: {name} is empty")
        missing = [item.path for item in items if not item.path.is_file()]
        if missing:
            raise UserError(
                f"evaluation.image_root: {name} names {len(missing)} images of {len(items)} that do not exist, the "
                f"first is {missing[0]}; set it to the folder that the paths begin in"
            )
        self.name, self.data, self.items, self.reading = name, data, items, reading
        self.num_samples = len(items)
        self.caption_lists = [item.captions for item in items]
        self.labels: list[Any] | None = [item.label for item in items] if items[0].label is not None else None
        numbers: dict[Any, int] = {}
        keys = [("path", item.path) if item.image_id is None else ("id", item.image_id) for item in items]
        self.image_ids = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """A rank's images, `batch_size` at a time; the last batch may be shorter."""
        mine = share(self.num_samples)
        for start in range(mine.start, mine.stop, batch_size):
            rows = range(start, min(start + batch_size, mine.stop))
            images = torch.stack([self._image(self.items[row]) for row in rows])
            texts = self.reading.tokenizer(
                [self.items[row].captions[0] if self.items[row].captions else "" for row in rows]
            )
            yield Batch(ids=torch.tensor(rows), images=(images,), texts=(texts,))

    def _image(self, item: Item) -> Tensor:
        sample = Sample(
            {"jpg": item.path.read_bytes()},
            self.data.max_image_pixels,
            self.data.max_caption_characters,
            self.data.max_image_mib,
        )
        try:
            picture = decode(sample.image())
            return self.reading.view(picture if item.box is None else picture.crop(item.box))
        except BadSampleError as error:
            raise UserError(f"{_KEY}: {self.name}: {item.path} cannot be used: {error}") from error


def holds_shards(folder: Path) -> bool:
    """Whether a folder is one of shards."""
    return any((folder / name).is_file() for name in INDEX_NAMES) or bool(shards_in(folder))


def is_picture_folder(path: Path) -> bool:
    """Whether a folder holds pictures, at any depth, and no shards."""
    return path.is_dir() and not holds_shards(path) and holds_picture(path)


def picture_folder(path: Path) -> list[Item]:
    """Every picture of a folder, with the lines of the .txt of the same name, and its class where folders are classes.

    They are, unless pictures with a .txt lie beside them. The order is that of classes and names.

    Raises:
        UserError: a class without pictures or two of one name, or pictures with neither class nor text.
    """
    found = find_pictures(path)
    if found.passed_over:
        log.warning("%s: %s: %s", _KEY, path, found.told())
    here = [picture for picture in found.pictures if picture.parent == path]
    if any(map(found.has_text, here)):
        items = [Item(picture, found.captions(picture)) for picture in found.pictures]
        bare = [item.path for item in items if not item.captions]
        if bare:
            raise UserError(
                f"{_KEY}: {path}: expected a text beside each picture, got none for {len(bare):,} of {len(items):,}, "
                f"the first is {bare[0].relative_to(path)}; write {bare[0].stem}.txt, or take the picture out"
            )
        return items
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not is_hidden(folder))
    if not folders:
        raise UserError(
            f"{_KEY}: {path}: expected a .txt beside each picture, or a folder for each class, got "
            f"{len(here):,} pictures without either"
        )
    if here:
        log.warning("%s: %s: %d pictures beside the class folders are not looked at", _KEY, path, len(here))
    found.pictures = [picture for picture in found.pictures if picture.parent != path]
    return _of_classes(path, folders, found)


def _of_classes(path: Path, folders: list[Path], found: FoundPictures) -> list[Item]:
    full = {path / picture.relative_to(path).parts[0] for picture in found.pictures}
    void = next((folder for folder in folders if folder not in full), None)
    if void is not None:
        told = find_pictures(void).told()
        raise UserError(
            f"{_KEY}: {path}: the class {void.name} has no images; remove the folder or fill it{told and '; ' + told}"
        )
    classes = Classes(path, found.pictures)
    named: dict[str, Path] = {}
    items: list[Item] = []
    for picture in found.pictures:
        folder = classes.folder(picture) or path
        if named.setdefault(folder.name, folder) != folder:
            both = " and ".join(str(one.relative_to(path)) for one in (named[folder.name], folder))
            raise UserError(f"{_KEY}: {path}: both {both} hold the class {folder.name}; name the folder of one of them")
        items.append(Item(picture, found.captions(picture), folder.name))
    some = sum(bool(item.captions) for item in items)
    if 0 < some < len(items):
        log.warning("%s: %s: %d of %d pictures have a .txt: retrieval needs all", _KEY, path, some, len(items))
        items = [replace(item, captions=[]) for item in items]
    return sorted(items, key=lambda item: (str(item.label), item.path))


def annotations(name: str, content: Any, root: Path, split: str) -> list[Item]:
    """The items of a JSON list, of COCO's captions or of a Karpathy split; entries of one image are one item.

    Args:
        split: which of Karpathy's splits.

    Raises:
        UserError: none of these, an image without captions, or no such split.
    """
    where = f"{_KEY}: {name}"
    kind = kind_of(content, where)
    found = list(entries(content, kind, where))
    splits = sorted({entry.split for entry in found if entry.split is not None})
    if splits and split not in splits:
        raise UserError(f"{where}: expected one of the splits {', '.join(splits)}, got {split}")
    items: dict[Any, Item] = {}
    left_out: Counter[str] = Counter()
    for entry in found:
        if entry.split not in (None, split):
            continue
        if entry.image is None:
            raise UserError(f"{where}: entry {entry.number}: expected image and caption, got {entry.words}")
        left_out.update(entry.left_out)
        negatives = {kind: list(texts) for kind, texts in entry.negatives.items()}
        # Wrong captions belong to their own caption: such an entry is an item, though others show the same image.
        key = (entry.number, entry.image) if negatives else entry.image
        item = items.setdefault(key, Item(root / entry.image, image_id=entry.image_id, negatives=negatives))
        item.captions.extend(entry.captions)
    bare = next((item.path for item in items.values() if not item.captions), None)
    if bare is not None:
        raise UserError(f"{where}: {bare} has no caption; take it out of the file, or give it one")
    if left_out:
        log.warning("%s: left out %s", where, ", ".join(f"{n:,} {words}" for words, n in left_out.most_common()))
    return list(items.values())
