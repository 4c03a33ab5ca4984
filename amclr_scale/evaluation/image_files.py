"""Benchmarks that come as image files: annotations of pairs, or one folder per class.

    Karpathy's JSON     {"images": [{"split", "filename", ["filepath"], ["imgid"], "sentences": [{"raw"}]}]}
                        Karpathy & Fei-Fei, CVPR 2015, arXiv:1412.2306: COCO and Flickr30k, split `test` by custom
    a JSON list         [{"image", "caption": one or several, ["image_id"], ["negatives"]}]: ALBEF's coco_test.json,
                        flickr30k_test.json and the like
    folders             CLASS/*.jpg, classes in the order of the folders' names, as torchvision's ImageFolder

Images are seen as those of shards are.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale.config.schema import Data
from amclr_scale.data.decoding import BadSampleError, Sample, decode
from amclr_scale.data.image_views import evaluation_view, to_tensor
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.data.text_views import clean_caption
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.errors import UserError
from amclr_scale.evaluation.shares import share
from amclr_scale.types import Batch

_KEY = "evaluation.splits"


@dataclass(frozen=True)
class Item:
    """One image file and what is known about it."""

    path: Path
    captions: list[str] = field(default_factory=list)
    label: str | None = None
    image_id: Any = None  # images with the same one are the same image; None: this one is alone
    negatives: dict[str, list[str]] = field(default_factory=dict)  # wrong captions by what is wrong with them

    def cleaned(self) -> "Item":
        """With captions as ALBEF cleans them."""
        negatives = {kind: [clean_caption(text) for text in texts] for kind, texts in self.negatives.items()}
        return replace(self, captions=[clean_caption(text) for text in self.captions], negatives=negatives)


class ImageFiles:
    """A split made of image files, with the interface of `EvaluationSplit`."""

    def __init__(self, name: str, data: Data, items: list[Item], *, squash: bool = False):
        if not items:
            raise UserError(f"{_KEY}: {name} is empty")
        missing = [item.path for item in items if not item.path.is_file()]
        if missing:
            raise UserError(
                f"evaluation.image_root: {name} names {len(missing)} images of {len(items)} that do not exist, the "
                f"first is {missing[0]}; set it to the folder that the paths begin in"
            )
        self.name, self.data, self.items, self.squash = name, data, items, squash
        self.tokenizer = load_tokenizer(data.tokenizer, data.context_length)
        self.num_samples = len(items)
        self.caption_lists = [item.captions for item in items]
        self.labels: list[Any] | None = [item.label for item in items] if items[0].label is not None else None
        numbers: dict[Any, int] = {}
        keys = [("file", i) if item.image_id is None else ("id", item.image_id) for i, item in enumerate(items)]
        self.image_ids = torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """A rank's images, `batch_size` at a time; the last batch may be shorter."""
        mine = share(self.num_samples)
        for start in range(mine.start, mine.stop, batch_size):
            rows = range(start, min(start + batch_size, mine.stop))
            images = torch.stack([self._image(self.items[row].path) for row in rows])
            texts = self.tokenizer([self.items[row].captions[0] if self.items[row].captions else "" for row in rows])
            yield Batch(ids=torch.tensor(rows), images=(images,), texts=(texts,))

    def _image(self, path: Path) -> Tensor:
        sample = Sample({"jpg": path.read_bytes()}, self.data.max_image_pixels, self.data.max_caption_characters)
        try:
            return to_tensor(evaluation_view(decode(sample.image()), self.data.image_size, squash=self.squash))
        except BadSampleError as error:
            raise UserError(f"{_KEY}: {self.name}: {path} cannot be used: {error}") from error


def is_class_folders(path: Path) -> bool:
    """Whether a folder holds folders of images."""
    return any(_images(folder) for folder in sorted(path.iterdir())[:3] if folder.is_dir())


def class_folders(path: Path) -> list[Item]:
    """Every image of every class folder, in the order of names.

    Raises:
        UserError: a class without images.
    """
    items: list[Item] = []
    for folder in sorted(folder for folder in path.iterdir() if folder.is_dir()):
        images = _images(folder)
        if not images:
            raise UserError(f"{_KEY}: {path}: the class {folder.name} has no images; remove the folder or fill it")
        items += [Item(image, label=folder.name) for image in images]
    return items


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS)


def annotations(name: str, content: Any, root: Path, split: str) -> list[Item]:
    """The items of either kind of JSON.

    Args:
        split: which of Karpathy's splits.

    Raises:
        UserError: neither kind, an item without captions, or no such split.
    """
    if isinstance(content, dict) and isinstance(content.get("images"), list):
        return _karpathy(name, content["images"], root, split)
    if not isinstance(content, list):
        raise UserError(
            f"{_KEY}: {name}: expected a list of {{image, caption}} or Karpathy's {{images: [...]}}, got neither"
        )
    items = []
    for number, entry in enumerate(content):
        if not isinstance(entry, dict) or not isinstance(entry.get("image"), str):
            raise UserError(f"{_KEY}: {name}: entry {number}: expected image and caption, got {_short(entry)}")
        captions = _strings(entry.get("caption"))
        if not captions:
            raise UserError(f"{_KEY}: {name}: entry {number} ({entry['image']}) has no caption")
        negatives = entry.get("negatives") or {}
        kinds = negatives if isinstance(negatives, dict) else {"negatives": negatives}
        wrong = {str(kind): _strings(texts) for kind, texts in kinds.items()}
        items.append(Item(root / entry["image"], captions, image_id=entry.get("image_id"), negatives=wrong))
    return items


def _karpathy(name: str, images: list[Any], root: Path, split: str) -> list[Item]:
    wrong = next((i for i, entry in enumerate(images) if not isinstance(entry, dict) or "split" not in entry), None)
    if wrong is not None:
        raise UserError(
            f"{_KEY}: {name}: images[{wrong}]: expected an image with its split, got {_short(images[wrong])}"
        )
    found = sorted({str(entry["split"]) for entry in images})
    if split not in found:
        raise UserError(f"{_KEY}: {name}: expected one of the splits {', '.join(found)}, got {split}")
    items = []
    for number, entry in enumerate(images):
        if entry["split"] == split:
            try:
                captions = [str(sentence["raw"]).strip() for sentence in entry["sentences"]]
                path = root / entry.get("filepath", "") / entry["filename"]
            except (KeyError, TypeError) as error:
                raise UserError(
                    f"{_KEY}: {name}: images[{number}]: expected filename and sentences with raw, got {_short(entry)}"
                ) from error
            if not captions:
                raise UserError(f"{_KEY}: {name}: images[{number}] ({entry['filename']}) has no caption")
            items.append(Item(path, captions, image_id=entry.get("imgid")))
    return items


def _strings(value: Any) -> list[str]:
    listed = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [text.strip() for text in listed if isinstance(text, str) and text.strip()]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 80 else f"{text[:77]}..."
