"""Two banks, one of images and one of texts, as further keys of a contrast: what objectives with banks share.

Both know their rows by the sample's id, so that an anchor finds its own sample's rows whichever modality they are of.
Such rows are false negatives, and are left out unless `exclude_same_id` is off; they are counted in either case.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.objectives.banks.bank import Bank, Contents, Own
from amclr_scale.objectives.base import Layout, Objective, at_least_float32, require
from amclr_scale.similarity import ExtraKeys, all_sum
from amclr_scale.types import Embeddings


@dataclass(frozen=True, kw_only=True)
class BankOptions:
    """Options of every objective that is about banks."""

    size: int = 65_536  # slots per modality, at least the global batch; 0: none
    width: int | None = None  # of the embeddings; null: as they come
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of what is stored
    init: Literal["empty", "batch", "randn", "rand", "zeros"] = "empty"  # what counts as a key before it was stored
    exclude_same_id: bool = True  # an anchor leaves out what its own sample has stored
    wait_epochs: float = 0.0  # passes over the data during which what is stored is no key yet

    def __post_init__(self) -> None:
        require(self.size >= 0, "size", "at least as many slots as the global batch has samples, or 0", self.size)
        require(self.wait_epochs >= 0, "wait_epochs", "a number of epochs, 0 or more", self.wait_epochs)
        require(self.width is None or self.width > 0, "width", "the width of the embeddings, or null", self.width)


@dataclass(frozen=True)
class Look:
    """What the two banks give to a step."""

    extra_images: ExtraKeys | None  # keys of text anchors
    extra_texts: ExtraKeys | None  # keys of image anchors
    image: Own | None  # what this rank's samples have stored before
    text: Own | None
    metrics: dict[str, Tensor | float]


class Queues(nn.Module):
    """A bank of images and a bank of texts."""

    def __init__(self, options: BankOptions, layout: Layout) -> None:
        super().__init__()
        self.size, self.exclude_same_id, self.wait_epochs = options.size, options.exclude_same_id, options.wait_epochs
        self.image, self.text = (
            Bank(options.size, options.width, init=options.init, dtype=options.dtype, layout=layout, seed=seed)
            for seed in (0, 1)
        )

    def allocate(self, width: int) -> None:
        """See `Objective.allocate`."""
        for bank in (self.image, self.text):
            if bank.width is None:
                bank.make(width)

    def rehearse(self, width: int, slots: int) -> None:
        """See `Objective.rehearse`."""
        self.size = min(self.size, slots)
        for bank in (self.image, self.text):
            bank.rehearse(width, slots)

    def look(self, image: Tensor, text: Tensor, ids: Tensor, epoch: float) -> Look:
        """What they hold. Every rank calls it.

        Args:
            image: (b, D), this rank's rows, which `put` will store.
            text: (b, D).
            ids: (b,) int64, their samples.
            epoch: passes over the data so far.
        """
        if not self.size:
            return Look(None, None, None, None, {})
        pairs = ((self.image, image.detach()), (self.text, text.detach()))
        images, texts = (bank.contents(rows, ids) for bank, rows in pairs)
        of_image, of_text = images.own(ids), texts.own(ids)
        same = of_image.count.double().mean()  # both banks have the same samples in the same slots
        filled = images.filled
        metrics: dict[str, Tensor | float] = {
            "bank_filled": float(filled),
            "bank_age": images.age(),
            "bank_same_id": same,
            "bank_masked": same / max(1, filled) if self.exclude_same_id else 0.0,
            "bank_drift": drift((image, of_image), (text, of_text)),
        }
        if not filled or epoch < self.wait_epochs:
            return Look(None, None, of_image, of_text, metrics)
        return Look(self._keys(images, ids, of_image), self._keys(texts, ids, of_text), of_image, of_text, metrics)

    def _keys(self, held: Contents, ids: Tensor, own: Own) -> ExtraKeys:
        if not self.exclude_same_id:
            return ExtraKeys(held.features, sharded=held.sharded, total=held.filled)
        return ExtraKeys(held.features, held.ids, ids, held.sharded, held.filled, own.count)

    def put(self, image: Tensor, text: Tensor, ids: Tensor) -> None:
        """Store this rank's rows, (b, D) each, in place of the oldest."""
        if self.size:
            self.image.put(image.detach(), ids)
            self.text.put(text.detach(), ids)


class KeepsQueues(Objective):
    """An objective whose options are a bank's: what the two banks ask of it."""

    stores_features = True
    config: BankOptions

    @staticmethod
    def mistakes_of(options: Any, B: int, b: int) -> Iterable[str]:
        if 0 < options.size < B:
            yield f"size: expected at least train.global_batch_size = {B} slots, or 0, got {options.size}"

    def __init__(self, config: BankOptions, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.bank = Queues(config, sample_state)

    def allocate(self, width: int) -> None:
        self.bank.allocate(width)

    def rehearse(self, width: int, slots: int) -> None:
        self.bank.rehearse(width, slots)


@torch.no_grad()
def drift(*sides: tuple[Tensor, Own]) -> Tensor:
    """Of the global batch's samples that have stored something, the mean of 1 - cosine between that and what they are
    now, (), the mean over sides; 0 of a side where none has. Every rank calls it.

    Args:
        sides: this rank's rows (b, D), and what their samples have stored.
    """
    found = []
    for rows, own in sides:
        x = at_least_float32(rows)
        turned = 1 - F.cosine_similarity(x, own.rows.to(x.dtype), dim=1)
        found.append(torch.stack([turned.masked_fill(~own.there, 0.0).sum(), own.there.sum().to(x.dtype)]))
    sums = all_sum(torch.stack(found))  # (sides, 2)
    moved: Tensor = sums[:, 0] / sums[:, 1].clamp(min=1)
    return moved.mean()


def proximal(rows: Tensor, own: Own | None) -> Tensor | float:
    """Mean over this rank's samples of |x_i - q_i|^2, q_i what sample i has stored last; 0 where there is nothing."""
    if own is None:
        return 0.0
    x = at_least_float32(rows)
    distance = (x - own.rows.to(x.dtype)).square().sum(1)
    return torch.where(own.there, distance, 0.0).mean()


def ids_of(embeddings: Embeddings) -> Tensor:
    """The samples, on the device of the embeddings."""
    assert embeddings.ids is not None, "Objective.__call__ refuses this"
    return embeddings.ids.to(embeddings.image.device)
