"""Held-out pairs: every sample exactly once over the ranks, in order, without any randomness."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.decoding import BadSampleError, Field, Sample, check_whole, decode
from amclr_scale.data.indexing import IMAGE_EXTENSIONS, open_index
from amclr_scale.data.reading import Reading, reading_of
from amclr_scale.data.sources import CORPORA, resolve
from amclr_scale.data.text_views import clean_caption, parse_places
from amclr_scale.errors import UserError
from amclr_scale.types import Batch

_KEY = "evaluation.splits"


class EvaluationSplit:
    """One split, and this rank's share r n // W .. (r + 1) n // W - 1 of its n samples.

    Args:
        name: as in `data.train`: a split of the embedded corpus, an index, a folder, shards.
        data: the recipe's section: image size, tokenizer, limits.
        classes: where a sample's class is (json.FIELD or a member such as cls); None: no classes.
        reading: how the model reads pictures and captions; None: as `data` says.
        clean: clean captions as ALBEF does (`clean_caption`).
        key: that it was given as, for messages.

    Attributes:
        num_samples: n.
        ids: (n,) int64, 0 .. n - 1.
        captions: n strings, the first caption of each sample.
        caption_lists: n lists, every caption: the lines of a .txt, or a list in the JSON.
        labels: n class labels as they are stored (int or str), or None.
        image_ids: (n,) int64: samples that show the same image have the same number (JSON `image_id`; else the id).
        share: (first, last + 1) of this rank.

    Raises:
        UserError: the split is missing, or one of its samples cannot be used: a benchmark is whole or it is none.
    """

    def __init__(
        self,
        name: str,
        data: schema.Data,
        *,
        rank: int = 0,
        world_size: int = 1,
        classes: str | None = None,
        reading: Reading | None = None,
        clean: bool = False,
        key: str = _KEY,
        begun: bool = False,
    ):
        self.name, self.data, self.clean, self._called = name, data, clean, key
        self.index = open_index(data, name, key, begun=begun)
        self.reading = reading or reading_of(data)
        self.num_samples = n = self.index.num_samples
        self.share = (rank * n // world_size, (rank + 1) * n // world_size)
        self.ids = torch.arange(n)
        self._caption = parse_places(data.caption)[0]
        self._class = Field.parse(classes) if classes else None
        self.caption_lists, self.labels, self.image_ids = self._metadata()
        self.captions = [captions[0] for captions in self.caption_lists]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Samples of the rank, `batch_size` at a time; the last batch may be shorter."""
        first, end = self.share
        for start in range(first, end, batch_size):
            ids = range(start, min(start + batch_size, end))
            images = torch.stack([self._image(sample) for sample in ids])
            texts = self.reading.tokenizer([self.captions[sample] for sample in ids])
            yield Batch(ids=torch.tensor(ids), images=(images,), texts=(texts,))

    def key(self, sample: int) -> str:
        """Shard and key of a sample, for messages and lists."""
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        return f"{Path(reader.url).name}/{reader.key(row)}"

    def arrays(self, member: str = "npy") -> list[Any]:
        """What numpy has written beside every sample, such as WILDS' metadata.

        Raises:
            UserError: a sample has none, or one that is none of numpy's.
        """
        found = []
        for sample in range(self.num_samples):
            raw = self._sample(sample, frozenset({member})).members.get(member)
            try:
                if raw is None:
                    raise ValueError(f"it has no .{member}")
                found.append(np.load(io.BytesIO(raw), allow_pickle=False))
            except (ValueError, OSError, EOFError, TokenError) as error:
                raise UserError(
                    f"{self._called}: {self.name}: sample {self.key(sample)}: expected an array of numpy at .{member}, "
                    f"got: {error}"
                ) from error
        return found

    def close(self) -> None:
        """Close the shards."""
        self.index.close()

    def _sample(self, sample: int, members: frozenset[str]) -> Sample:
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        check_whole(reader, row)
        return Sample(
            reader.read(row, members),
            self.data.max_image_pixels,
            self.data.max_caption_characters,
            self.data.max_image_mib,
        )

    def _refuse(self, sample: int, error: BadSampleError) -> UserError:
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        what = f"{error.kind} {error.detail}".rstrip()
        return UserError(
            f"{self._called}: {self.name}: sample {reader.key(row)} of {reader.url} cannot be used: {what}"
        )

    def _image(self, sample: int) -> Tensor:
        try:
            opened = self._sample(sample, frozenset(IMAGE_EXTENSIONS)).image()
            return self.reading.view(decode(opened))
        except BadSampleError as error:
            raise self._refuse(sample, error) from error

    def _metadata(self) -> tuple[list[list[str]], list[Any] | None, Tensor]:
        wanted = {self._caption.member, "json"} | ({self._class.member} if self._class else set())
        image_field = Field.parse("json.image_id")
        captions, labels, numbers = list[list[str]](), list[Any](), dict[Any, int]()
        image_ids = torch.empty(self.num_samples, dtype=torch.int64)
        for i in range(self.num_samples):
            try:
                sample = self._sample(i, frozenset(wanted))
                found = sample.captions(self._caption)
                lines = (line.strip() for text in found for line in text.split("\n"))
                captions.append([clean_caption(line) if self.clean else line for line in lines if line])
                if self._class:
                    labels.append(self._label(sample, self._class))
                image = sample.value(image_field)
            except BadSampleError as error:
                raise self._refuse(i, error) from error
            image_ids[i] = numbers.setdefault(("sample", i) if image is None else ("image", image), len(numbers))
        return captions, labels if self._class else None, image_ids

    def _label(self, sample: Sample, field: Field) -> Any:
        value = sample.value(field)
        if isinstance(value, str) and value.isdecimal():
            return int(value)
        if not isinstance(value, int | str):
            raise UserError(
                f"evaluation.classes: {self.name}: expected a class (a number or a name) at {field} of every sample, "
                f"got {value!r}; say where classes are, or null for retrieval alone"
            )
        return value


def class_names(name: str, data: schema.Data, classes: str, *, begun: bool = False) -> list[str]:
    """The class names behind a split's labels, in the order of the labels.

    The embedded corpus has them in classes.json, by field; other data sets in a classnames.txt beside their index or
    shards, one a line (CLIP_benchmark's layout); where labels are names, the sorted distinct names are the classes.

    Raises:
        UserError: there is no list for numbered classes.
    """
    source = resolve(name, _KEY)
    field = Field.parse(classes)
    if source.index and source.index.is_relative_to(CORPORA):
        lists: dict[str, list[str]] = json.loads((source.index.parent.parent / "classes.json").read_text("utf-8"))
        if field.path and field.path[-1] in lists:
            return lists[field.path[-1]]
        expected = ", ".join(f"json.{known}" for known in sorted(lists))
        raise UserError(f"evaluation.classes: expected one of {expected}, got {classes}")
    folder = (source.index or Path(source.urls[0])).parent
    for file in (folder / "classnames.txt", folder.parent / "classnames.txt"):
        if file.is_file():
            return [line.strip() for line in file.read_text("utf-8").splitlines() if line.strip()]
    labels = EvaluationSplit(name, data, classes=classes, begun=begun).labels or []
    if not all(isinstance(label, str) for label in labels):
        raise UserError(
            f"evaluation.classes: {name}: expected a classnames.txt beside the index (one name a line), found none, "
            f"and {classes} holds numbers"
        )
    return sorted(set(labels))
