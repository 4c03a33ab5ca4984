"""What is not a negative although it is another sample: the options that every softmax objective shares.

A batch that is large for its data set meets the same picture or caption several times, and each time as a negative of
itself. With `mask_duplicates` such keys are left out of the sums over keys: of the denominator of a softmax, and of the
mean that SogCLR's relatives take. A pair stays its own positive. `false_negative_margin` m leaves out keys that are
more like the anchor than its positive by more than m, s_ij > s_ii + m: Zhang et al., "Qwen3 Embedding", 2025,
arXiv:2506.05176, has m = 0.1. It has no gradient, and does not change the number of keys that a mean divides by.

`queue` adds keys: what the last batches held (banks/shared_queue.py).

An anchor that is left without any key, in a batch of copies of one sample, has nothing to say: its term is 0.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.objectives.banks.shared_queue import Queue
from amclr_scale.objectives.base import require
from amclr_scale.objectives.layers import LayerOptions
from amclr_scale.similarity import ExtraKeys
from amclr_scale.similarity.contrast import Side
from amclr_scale.types import Embeddings


@dataclass(frozen=True, kw_only=True)
class MaskOptions(LayerOptions):
    """Options of every objective whose denominators leave keys out."""

    mask_duplicates: Literal["none", "image", "text", "both"] = "none"  # not negatives: the same image, or caption
    false_negative_margin: float | None = None  # nor what is more similar than the positive by this; null: all are
    queue: Queue | None = None  # features of the last batches are further keys

    def __post_init__(self) -> None:
        margin = self.false_negative_margin
        expected = "a difference of similarities of at least 0, such as 0.1, or null"
        require(margin is None or margin >= 0, "false_negative_margin", expected, margin)

    def masks(self, embeddings: Embeddings) -> "Masking":
        """What these options leave out of a batch."""
        groups: list[Tensor] = []
        if self.mask_duplicates in ("image", "both"):
            assert embeddings.ids is not None, "Objective.__call__ refuses this"
            groups.append(embeddings.ids.to(embeddings.image.device))
        if self.mask_duplicates in ("text", "both"):
            groups.append(embeddings.text_content.to(embeddings.image.device))
        return Masking(tuple(groups), self.false_negative_margin)

    @property
    def masked(self) -> bool:
        """Whether the keys are other than those of the batch."""
        changed = self.mask_duplicates != "none" or self.false_negative_margin is not None
        return changed or (self.queue is not None and self.queue.size > 0)


def refuse_masks(options: MaskOptions, hinged: bool) -> None:
    """Raise where the options leave keys out of what is not a log-sum."""
    fix = "without masks and queue, or surrogate: none"
    require(not (hinged and options.masked), "surrogate", fix, "squared_hinge")


@dataclass(frozen=True)
class Masking:
    """Groups of this rank's samples, alike for images and texts, and a margin; and the keys of a queue."""

    groups: tuple[Tensor, ...] = ()  # (b,) int64 each
    margin: float | None = None
    images: ExtraKeys | None = None  # further keys of text anchors
    texts: ExtraKeys | None = None
    key_gradient: bool = True
    gradient_width: int | None = None  # columns of the features that have a gradient, where some are constants

    def of(self, rows: slice = slice(None)) -> dict[str, Any]:
        """What `contrast` is told, of some rows."""
        groups = tuple(x[rows] for x in self.groups) or None
        told: dict[str, Any] = {"image_groups": groups, "text_groups": groups, "margin": self.margin}
        if not self.key_gradient:
            told["key_gradient"] = False
        if self.gradient_width is not None:
            told["gradient_width"] = self.gradient_width
        for name, keys in (("extra_image_keys", self.images), ("extra_text_keys", self.texts)):
            told[name] = None if keys is None else keys.of(rows)
        return told

    def among(self, side: Literal["image", "text"]) -> "Masking":
        """The same for views of one modality, which are both anchors and keys."""
        keys = self.images if side == "image" else self.texts
        return replace(self, images=keys, texts=keys)


NO_MASK = Masking()


def limited(masks: Mapping[str, Any], positive: Tensor) -> dict[str, Any]:
    """What `contrast` is told, for keys whose own row is not the positive that the margin is about.

    Args:
        positive: (b,), the similarities of the positives.
    """
    margin = masks.get("margin")
    return {**masks, "margin": None, "limit": None if margin is None else positive.detach() + margin}


def where_keys(side: Side, terms: Tensor) -> Tensor:
    """(b,): 0 for anchors that are left without a key, by their group or by the margin."""
    return torch.where(side.log_sum.isneginf(), 0.0, terms)
