"""From visits to tensors: read, decode, augment, tokenise. What a worker does, and nothing that depends on it.

A sample that cannot be used is replaced by another one, whose id is drawn from (seed, pass, id) alone: every rank
count and every number of workers replaces it by the same sample, which then carries its own id.
"""

from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from amclr_scale.addresses import masked
from amclr_scale.config import schema
from amclr_scale.data.augmentation.cropping import START
from amclr_scale.data.augmentation.plans import most_operations
from amclr_scale.data.augmentation.shipping import COLUMNS, Shipment
from amclr_scale.data.beside.features import open_features
from amclr_scale.data.beside.hard_pictures import HardPictures
from amclr_scale.data.beside.paraphrases import ParaphraseReader
from amclr_scale.data.beside.references import open_references
from amclr_scale.data.captions.hard_captions import HardCaptions
from amclr_scale.data.decoding import PARAPHRASES, BadSampleError, Field, Sample, check_whole, class_number, decode
from amclr_scale.data.image_views import augmented_view, count_repeated, reduction_for, to_tensor
from amclr_scale.data.index import Index
from amclr_scale.data.indexing import IMAGE_EXTENSIONS
from amclr_scale.data.order import Visits
from amclr_scale.data.parts.part import Fault, Part
from amclr_scale.data.randomness import Draws, Purpose
from amclr_scale.data.resident.groups import Groups
from amclr_scale.data.resident.store import ResidentData, open_resident
from amclr_scale.data.resident.tokens import ResidentTokens, open_tokens, rows_of
from amclr_scale.data.text_views import TextViews
from amclr_scale.data.tokenizers import Tokenizer
from amclr_scale.errors import UserError

_ATTEMPTS = 1000  # replacements tried for one sample; past that the data set has no good samples to speak of


# Image id, label, pixels of views (or whose features these are) and of hard negatives, captions, hard ones of these.
Views = tuple[int, int, Sequence[Tensor | int | None], list[str], list[str | None]]


class Pipeline:
    """`pipeline(visits)` -> `Part`; the same visits give the same part anywhere.

    Attributes:
        text: which captions the views show.
        resident: the decoded data set, once `hold` has opened it.
        tokens: of all captions, where they are held instead.
        on_device: whether images are rows, of which `DeviceViews` makes views; `of_base`: views of the base view.
        references: features of frozen models, by the name that objectives know them by.
        features: of frozen towers, by the side whose picture or caption they stand for.
        groups: which samples show the same, where further views are drawn from these.
    """

    def __init__(self, index: Index, data: schema.Data, seed: int, tokenizer: Tokenizer):
        self.index, self.data, self.seed, self.tokenizer = index, data, seed, tokenizer
        self.text, self.hard, self.hard_pictures = TextViews(data), HardCaptions(data), HardPictures(data)
        if data.image_negatives and data.resident != "none":
            raise UserError(
                f"data.resident: expected none with data.image_negatives, which are not held, got {data.resident}"
            )
        self._image_id = Field.parse(data.image_id) if data.image_id else None
        self._labels = Field.parse(data.labels) if data.labels else None
        self.references = open_references(data, index)
        self.features = open_features(data, index, tokenizer)
        self._image_group = Field.parse(data.image_group) if data.image_group else None
        others = {field.member for field in (self._image_id, self._labels, self._image_group) if field}
        words = frozenset[str]() if "text" in self.features else self.text.members
        self._texts = words | self.hard.members | others
        self._kept = sorted(self._texts - {PARAPHRASES})  # where the data set is held
        pictures = frozenset[str]() if "image" in self.features else frozenset(IMAGE_EXTENSIONS)
        self._wanted = self._texts | pictures | frozenset(self.hard_pictures.members)
        self.resident: ResidentData | None = None
        self.tokens: ResidentTokens | None = None
        self.groups: Groups | None = None
        self._recipes = [data.augmentation] + [data.image_view or data.augmentation] * data.image_views
        self._steps = max(map(most_operations, self._recipes))
        self.on_device = "image" not in self.features and "device" in (data.resident, data.augment_on)
        self.of_base = range(1, len(self._recipes)) if data.image_view_from == "base" else range(0)
        self._paraphrases = dict[int, ParaphraseReader]()
        if self.text.needs_paraphrases:
            ParaphraseReader(Path(data.paraphrases or ""), index.shards[0]).close()  # a wrong folder is told at once

    def hold(self) -> str:
        """Open the decoded data set, written first where there is none; samples then come from it.

        Returns:
            What the log should say; "" for nothing.

        Raises:
            UserError: there is no room for it.
        """
        data, index = self.data, self.index
        if "image" in self.features:
            self._hold_captions()
            return self._grouped()
        ranges = [(recipe.crop_scale, recipe.crop_ratio) for recipe in self._recipes]  # how far a JPEG is reduced
        how = (index.fingerprint, data.image_size, ranges, data.max_image_pixels, data.max_image_mib)
        kept = index.storage.cache, how, self._kept, index.num_samples
        self.resident = open_resident(*kept, self._stored, self._decoded)
        return self._grouped()

    def _grouped(self) -> str:
        """Know which samples show the same, where a recipe asks; what the log should say of it."""
        if self.data.image_view_from != "group":
            return ""
        self.groups = Groups(map(self._group_of, range(self.index.num_samples)))
        return self.groups.checked(str(self.data.image_group))

    def _hold_captions(self) -> None:
        """Of a data set whose pictures nobody opens: as tokens, where all that views show of a sample is captions."""
        data, index, cache = self.data, self.index, self.index.storage.cache
        name = index.fingerprint, data.max_caption_characters
        others = [data.text_negatives, data.image_id, data.labels, self.text.changes, self.text.needs_paraphrases]
        tokens = "text" not in self.features and not any(others)
        if data.image_view_from == "group" or not tokens:
            self.resident = open_resident(cache, name, self._kept, index.num_samples, self._stored)
        if tokens:
            read = self.read if self.resident else partial(self._stored, wanted=self.text.members)
            self.tokens = open_tokens(cache, name, self.text, self.tokenizer, index.num_samples, read)

    def _group_of(self, sample: int) -> Hashable | None:
        """The same by id; None also where its picture cannot be used."""
        assert self.resident
        try:
            if "image" in self.features:
                self.features["image"].check(sample)
            else:
                self.resident.size(sample)
            return self.group_of(self.read(sample))
        except BadSampleError:
            return None

    def group_of(self, content: Sample) -> Hashable | None:
        """What the sample says it shows; None where it says nothing, or nothing was asked for."""
        value = None if self._image_group is None else content.value(self._image_group)
        return value if isinstance(value, str | int) else None

    def __call__(self, visits: Visits) -> Part:
        data, n, features = self.data, len(visits), self.features.get("image")
        if self.tokens and features:
            tables = self.tokens, features, self.groups, data.image_views, self.references
            if rows := rows_of(visits, self.seed, *tables):
                repeated = {
                    "repeated_images": int(count_repeated(rows[0])),
                    "repeated_texts": int(count_repeated(rows[1])),
                }
                return Part(torch.from_numpy(visits.ids), None, *rows, [], repeated)
        made = (3, data.image_size, data.image_size)
        pictures = (COLUMNS + 3 * self._steps,) if self.on_device else made
        shape = pictures if features is None else ()
        kind = torch.uint8 if len(shape) == 3 else torch.int64
        images = tuple(torch.empty(n, *shape, dtype=kind) for _ in range(data.images_each))
        captions, hard, shown = list[list[str]](), list[list[str | None]](), list[list[bool]]()
        ids, image_ids, labels, faults = list[int](), list[int](), list[int](), list[Fault]()
        shipment = Shipment(data.image_size, self._steps, self.of_base)
        for i, (sample, number) in enumerate(zip(visits.ids.tolist(), visits.passes.tolist(), strict=True)):
            used, image_id, label, pixels, words, wrong = self._good(sample, number, faults, shipment)
            ids.append(used)
            image_ids.append(image_id)
            labels.append(label)
            captions.append(words)
            hard.append(wrong)
            for view, shows in zip(images, pixels, strict=True):
                view[i] = shows if shows is not None else shipment.blank() if self.on_device else 0
            shown.append([shows is not None for shows in pixels[1 + data.image_views :]])
        if features:
            images = tuple(features(view.numpy()) for view in images)
        texts = tuple(self.tokenizer(list(view)) for view in zip(*captions, strict=True))
        views = images[: 1 + data.image_views]
        for of_base in self.of_base if self.on_device else ():  # of the base views, one after another
            images[of_base][:, START] += torch.arange(n) * data.image_size**2
        repeated = {"repeated_images": 0 if self.on_device else int(count_repeated(views))}
        repeated["repeated_texts"] = int(count_repeated(texts))
        samples = torch.tensor(ids, dtype=torch.int64)
        negatives, there = self._hard(texts[0], hard) if texts else ((), torch.empty(0))
        given = {name: references(ids) for name, references in self.references.items()}
        if negatives:
            given["text_negative_mask"] = there
            repeated["missing_negatives"] = int((~there).sum())
        if data.image_negatives:
            given["image_negative_mask"] = torch.tensor(shown)
            repeated["missing_image_negatives"] = int((~given["image_negative_mask"]).sum())
        if self._labels:  # equal for one class, -1 for none
            given["labels"] = torch.tensor(labels, dtype=torch.int64)
        if "text" in self.features:
            texts = (self.features["text"](ids),)
        of_images = torch.tensor(image_ids, dtype=torch.int64) if self._image_id else samples
        text_ids = samples if self._image_id else None
        sent = shipment.pixels() if self.on_device and data.resident != "device" else None
        return Part(of_images, text_ids, images, texts + negatives, given, faults, repeated, sent)

    def _good(self, sample: int, number: int, faults: list[Fault], shipment: Shipment) -> tuple[int, *Views]:
        """The sample, or the first of its replacements that can be used. Only the sample itself counts as a fault."""
        draws = Draws(self.seed, Purpose.REPLACEMENT, number, sample)
        used, fault = sample, None
        for _ in range(_ATTEMPTS):
            try:
                return used, *self._views(used, number, shipment)
            except BadSampleError as error:
                if fault is None:
                    shard, row = self.index.locate(used)
                    reader = self.index.reader(shard)
                    fault = Fault(error.kind, used, masked(reader.url), reader.key(row), error.detail)
                    faults.append(fault)
                used = draws.below(self.index.num_samples)
        assert fault is not None
        raise UserError(
            f"data.train: sample {fault.key} of {fault.shard} cannot be used ({fault.words}), and neither can "
            f"{_ATTEMPTS:,} others drawn in its place; is this the right data set?"
        )

    def _views(self, sample: int, number: int, shipment: Shipment) -> Views:
        for features in self.features.values():
            features.check(sample)
        content = self.read(sample) if self._wanted else Sample({}, 1, 1)
        captions = [] if "text" in self.features else self.text.draw(content, self.seed, number, sample)
        hard = self.hard.draw(captions[0], content, self.seed, number, sample) if captions else []
        further = len(self._recipes) - 1
        sources = self.groups.sources(sample, further, self.seed, number) if self.groups else [sample] * (1 + further)
        shown: Sequence[Tensor | int | None] = sources
        if "image" not in self.features:
            shown = self._images(content, sample, number, sources, shipment)
        return self._image_of(content, sample), self.label_of(content), shown, captions, hard

    def _images(
        self, content: Sample, sample: int, number: int, sources: Sequence[int], shipment: Shipment
    ) -> Sequence[Tensor | None]:
        """Views of the pictures of some samples, and hard negatives; where devices make them, their rows.

        Args:
            sources: whose picture each view shows.
            shipment: what takes the pixels that the rows are about.
        """
        data, held = self.data, self.resident
        draws = [Draws(self.seed, Purpose.IMAGE, number, sample, view) for view in range(len(sources))]
        recipes = list(zip(self._recipes, draws, strict=True))
        if held and data.resident == "device":
            sizes, starts = [held.size(each) for each in sources], [int(held.starts[each]) // 3 for each in sources]
            return shipment.rows_of_held(sizes, starts, recipes)
        picture = held.picture(sample) if held else self._decoded(content)
        shown = [held.picture(each) if held and each != sample else picture for each in sources]
        hard = self.hard_pictures.draw(content, self.seed, number, sample)
        if self.on_device:
            wrong = [found and shipment.row_of_one(*found, data.augmentation) for found in hard]
            return [*shipment.rows(shown, recipes), *wrong]
        views, base = list[Image.Image | None](), None
        for source, recipe, own in zip(shown, self._recipes, draws, strict=True):
            views.append(augmented_view(base or source, data.image_size, recipe, own))
            base = views[0] if self.of_base else None
        for found in hard:
            views.append(found and augmented_view(found[0], data.image_size, data.augmentation, found[1]))
        return [None if view is None else to_tensor(view) for view in views]

    def _hard(self, texts: Tensor, captions: list[list[str | None]]) -> tuple[tuple[Tensor, ...], Tensor]:
        """Tokens of hard negatives, and which there are, (n, K): not those that are cut where they would differ."""
        negatives = tuple(self.tokenizer([one or "" for one in each]) for each in zip(*captions, strict=True))
        there = torch.tensor([[one is not None for one in each] for each in captions]).reshape(len(texts), -1)
        for k, tokens in enumerate(negatives):
            earlier = (texts, *negatives[:k])
            there[:, k] &= torch.stack([(tokens != other).any(1) for other in earlier]).all(0)
        return negatives, there

    def label_of(self, content: Sample) -> int:
        """A number of the sample's class; -1 where it has none, or none was asked for."""
        value = None if self._labels is None else content.value(self._labels)
        return -1 if value is None else class_number(value)

    def _decoded(self, content: Sample) -> Image.Image:
        opened = content.image()
        return decode(opened, reduction_for(opened, self.data.image_size, self._recipes))

    def _image_of(self, content: Sample, sample: int) -> int:
        """The id of the sample's image: unique over data sets, and below N."""
        if self._image_id is None:
            return sample
        first, end = self.index.part_of(sample)
        number = content.value(self._image_id)
        if not isinstance(number, int) or not 0 <= number < end - first:
            raise BadSampleError("bad image id", f"{self._image_id}: expected 0 .. {end - first - 1}, got {number!r}")
        return first + number

    def read(self, sample: int) -> Sample:
        """The members that captions and images are in.

        Raises:
            BadSampleError: they cannot be read.
        """
        if self.resident is None:
            content = self._stored(sample)
        else:
            members = self.resident.members(sample)
            content = Sample(members, self.data.max_image_pixels, self.data.max_caption_characters)
        if self.text.needs_paraphrases:
            shard, row = self.index.locate(sample)
            content.members = {**content.members, PARAPHRASES: self._paraphrases_of(shard).read(row)}
        return content

    def picture(self, sample: int) -> Tensor:
        """(3, H, W) uint8, what a recipe that leaves nothing to chance shows of it in every epoch."""
        decoded, draws = self._decoded(self._stored(sample)), Draws(self.seed, Purpose.IMAGE, 0, sample, 0)
        return to_tensor(augmented_view(decoded, self.data.image_size, self.data.augmentation, draws))

    def caption(self, sample: int) -> str:
        """The only one that it has.

        Raises:
            UserError: it has several, of which training draws one in every epoch.
        """
        found = self._stored(sample, self.text.members).captions(self.text.base[0])
        if len(found) > 1:
            shard, row = self.index.locate(sample)
            reader = self.index.reader(shard)
            raise UserError(
                f"data.features.text: expected one caption for each sample, got {len(found)} of "
                f"{reader.key(row)} in {reader.url}, of which each epoch draws one; write a sample for each "
                "(amclr-scale shards make), or leave data.features.text away"
            )
        return found[0]

    def digests(self) -> dict[str, str]:
        """Of each file of features, by key of `data`."""
        found = {name: of.digest() for name, of in self.references.items()}
        return found | {f"features.{side}": of.digest() for side, of in self.features.items()}

    def _stored(self, sample: int, wanted: frozenset[str] | None = None) -> Sample:
        shard, row = self.index.locate(sample)
        reader = self.index.reader(shard)
        check_whole(reader, row)
        members = reader.read(row, self._wanted if wanted is None else wanted)
        return Sample(members, self.data.max_image_pixels, self.data.max_caption_characters, self.data.max_image_mib)

    def _paraphrases_of(self, shard: int) -> ParaphraseReader:
        reader = self._paraphrases.get(shard)
        if reader is None:
            reader = ParaphraseReader(Path(self.data.paraphrases or ""), self.index.shards[shard])
            self._paraphrases[shard] = reader
            if len(self._paraphrases) > self.index.open_shards:
                self._paraphrases.pop(next(iter(self._paraphrases))).close()
        return reader
