"""From visits to tensors: read, decode, augment, tokenise. What a worker does, and nothing that depends on it.

A sample that cannot be used is replaced by another one, whose id is drawn from (seed, pass, id) alone: every rank
count and every number of workers replaces it by the same sample, which then carries its own id.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.decoding import PARAPHRASES, BadSampleError, Field, Sample, check_whole, decode
from amclr_scale.data.image_views import augmented_view, reduction_for, to_tensor
from amclr_scale.data.index import Index
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.data.order import Visits
from amclr_scale.data.paraphrases import ParaphraseReader
from amclr_scale.data.randomness import Draws, Purpose
from amclr_scale.data.text_views import TextViews
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.errors import UserError

_ATTEMPTS = 1000  # replacements tried for one sample; past that the data set has no good samples to speak of


@dataclass(frozen=True)
class Fault:
    """One sample that could not be used."""

    kind: str
    sample: int  # id
    shard: str
    key: str
    detail: str

    @property
    def words(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


@dataclass
class Part:
    """Some neighbouring samples of a batch."""

    ids: Tensor  # (n,) int64
    text_ids: Tensor | None  # (n,) int64, where images have ids of their own
    images: tuple[Tensor, ...]  # 1 + V of (n, 3, H, W) uint8
    texts: tuple[Tensor, ...]  # 1 + V of (n, L) int64
    faults: list[Fault]


class Pipeline:
    """`pipeline(visits)` -> `Part`; the same visits give the same part anywhere."""

    def __init__(self, index: Index, data: schema.Data, seed: int, tokenizer: Tokenizer):
        self.index, self.data, self.seed, self.tokenizer = index, data, seed, tokenizer
        self._text = TextViews(data)
        self._image_id = Field.parse(data.image_id) if data.image_id else None
        others = {self._image_id.member} if self._image_id else set()
        self._wanted = self._text.members | frozenset(IMAGE_EXTENSIONS) | others
        self._recipes = [data.augmentation] + [data.image_view or data.augmentation] * data.image_views
        self._paraphrases = dict[int, ParaphraseReader]()
        if self._text.needs_paraphrases:
            ParaphraseReader(Path(data.paraphrases or ""), index.shards[0]).close()  # a wrong folder is told at once

    def __call__(self, visits: Visits) -> Part:
        data, n = self.data, len(visits)
        images = tuple(
            torch.empty(n, 3, data.image_size, data.image_size, dtype=torch.uint8) for _ in range(1 + data.image_views)
        )
        captions = list[list[str]]()
        ids, image_ids, faults = list[int](), list[int](), list[Fault]()
        for i, (sample, number) in enumerate(zip(visits.ids.tolist(), visits.passes.tolist(), strict=True)):
            used, image_id, pixels, words = self._good(sample, number, faults)
            ids.append(used)
            image_ids.append(image_id)
            captions.append(words)
            for view, tensor in zip(images, pixels, strict=True):
                view[i] = tensor
        texts = tuple(self.tokenizer(list(view)) for view in zip(*captions, strict=True))
        samples = torch.tensor(ids, dtype=torch.int64)
        if not self._image_id:
            return Part(samples, None, images, texts, faults)
        return Part(torch.tensor(image_ids, dtype=torch.int64), samples, images, texts, faults)

    def _good(self, sample: int, number: int, faults: list[Fault]) -> tuple[int, int, list[Tensor], list[str]]:
        """The sample, or the first of its replacements that can be used. Only the sample itself counts as a fault."""
        draws = Draws(self.seed, Purpose.REPLACEMENT, number, sample)
        used, fault = sample, None
        for _ in range(_ATTEMPTS):
            try:
                return used, *self._views(used, number)
            except BadSampleError as error:
                if fault is None:
                    shard, row = self.index.locate(used)
                    reader = self.index.reader(shard)
                    fault = Fault(error.kind, used, reader.url, reader.key(row), error.detail)
                    faults.append(fault)
                used = draws.below(self.index.num_samples)
        assert fault is not None
        raise UserError(
            f"data.train: sample {fault.key} of {fault.shard} cannot be used ({fault.words}), and neither can "
            f"{_ATTEMPTS:,} others drawn in its place; is this the right data set?"
        )

    def _views(self, sample: int, number: int) -> tuple[int, list[Tensor], list[str]]:
        size, from_base = self.data.image_size, self.data.image_view_from == "base"
        content = self._read(sample)
        captions = self._text.draw(content, self.seed, number, sample)
        opened = content.image()
        picture = decode(opened, reduction_for(opened, size, self._recipes))
        views = list[Image.Image]()
        for view, recipe in enumerate(self._recipes):
            source = views[0] if view and from_base else picture
            views.append(augmented_view(source, size, recipe, Draws(self.seed, Purpose.IMAGE, number, sample, view)))
        return self._image_of(content, sample), [to_tensor(view) for view in views], captions

    def _image_of(self, content: Sample, sample: int) -> int:
        """The id of the sample's image: unique over data sets, and below N."""
        if self._image_id is None:
            return sample
        first, end = self.index.part_of(sample)
        number = content.value(self._image_id)
        if not isinstance(number, int) or not 0 <= number < end - first:
            raise BadSampleError("bad image id", f"{self._image_id}: expected 0 .. {end - first - 1}, got {number!r}")
        return first + number

    def _read(self, sample: int) -> Sample:
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        check_whole(reader, row)
        members = reader.read(row, self._wanted)
        if self._text.needs_paraphrases:
            members[PARAPHRASES] = self._paraphrases_of(shard).read(row)
        return Sample(members, self.data.max_image_pixels, self.data.max_caption_characters)

    def _paraphrases_of(self, shard: int) -> ParaphraseReader:
        reader = self._paraphrases.get(shard)
        if reader is None:
            reader = ParaphraseReader(Path(self.data.paraphrases or ""), self.index.shards[shard])
            self._paraphrases[shard] = reader
            if len(self._paraphrases) > self.index.open_shards:
                self._paraphrases.pop(next(iter(self._paraphrases))).close()
        return reader
