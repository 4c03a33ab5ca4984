"""CLIP: the softmax contrastive loss of each pair against the other pairs of the batch, in both directions.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.

With logits l_ij = s_ij / t over the keys j of all ranks (the positive j = i among them), and label smoothing e:

    L_i   = log sum_j exp(l_ij) - (1 - e) l_ii - e mean_j l_ij
    value = (1/2) mean_i (L_i + L'_i)                               L' has texts for anchors

Two controls of the batch-size study are the same loss over other sets:

    omega         further views of every image and text (AmCLR's): value is the mean over all (1 + omega)^2 pairings
                  of an image view with a text view, each contrasted by itself. So what AmCLR's views do without its
                  moving averages can be told.
    group_size    g consecutive pairs of the global batch share negatives: value is the mean over the B / g groups.
                  With g pairs encoded at once, this is what gradient accumulation without a gradient cache computes;
                  with g = B / W, what contrasting inside each rank does; in between, the grouped aggregation of
                  M2-Encoder (Guo et al., 2024, arXiv:2401.15896). g counts pairs, not ranks: the recipe alone decides.

Numerics: log-sum-exp in float32 over blocks of similarities, centred on the positive before the division by t, so a
loss of 1e-6 at t = 0.01 keeps its digits, and so does the temperature's gradient; mean_j l_ij needs only the mean key.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

from torch import Tensor

from amclr_scale.declarations import Equal, read_by_masks
from amclr_scale.distributed.collectives import Negatives
from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.objectives.reference import check_reference, in_excess, without_references
from amclr_scale.similarity import Contrast, column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class CLIP(Objective, name="clip"):
    """Two-way softmax cross-entropy over the batch (InfoNCE, ITC): the large-batch reference."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"group_size": None}
    group_option: ClassVar[str | None] = "group_size"

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `clip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        label_smoothing: float = 0.0  # share of the target spread evenly over all keys
        omega: int = 0  # further views per modality, all pairings of which are contrasted
        group_size: int | None = None  # pairs, consecutive in the global batch, that share negatives; null: all
        reference: bool = False  # similarities count in excess of a frozen model's, as in drrho

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(0 <= self.label_smoothing < 1, "label_smoothing", "a share in [0, 1)", self.label_smoothing)
            require(0 <= self.omega <= 8, "omega", "0 to 8 further views per modality", self.omega)
            fix = "0 beside masks: a target would lie on keys that are left out"
            require(not (self.label_smoothing and self.masked), "label_smoothing", fix, self.label_smoothing)
            enough = self.group_size is None or self.group_size > 1
            require(enough, "group_size", "at least 2 pairs, or null for the whole batch", self.group_size)
            require(not (self.reference and self.omega), "omega", "0 beside a reference: views have none", self.omega)
            check_reference(self, self.reference)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        views = {"image_views": options.omega, "text_views": options.omega}
        referred = {"image_reference": options.reference, "text_reference": options.reference}
        return {**read_by_masks(options), **views, **referred}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return int(options.group_size or B) - 1

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        if options.group_size != B:
            return None
        keys = ("temperature", "label_smoothing", "omega", "mask_duplicates", "false_negative_margin", "reference")
        others = {key: getattr(options, key) for key in keys}
        return Equal("clip", others, "one group is the whole batch")

    @staticmethod
    def mistakes_of(options: Any, B: int, b: int) -> Iterable[str]:
        size = options.group_size
        if size is not None and size > 0 and (B % size or (b % size and size % b)):
            yield (
                f"group_size: expected a divisor of train.global_batch_size = {B} that divides a rank's share of {b} "
                f"or is a multiple of it, got {size}"
            )

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        masking = self.masks(embeddings)
        if self.config.reference:
            embeddings = in_excess(embeddings)
            masking = without_references(masking, embeddings)
        images = (embeddings.image, *embeddings.image_views[: self.config.omega])
        texts = (embeddings.text, *embeddings.text_views[: self.config.omega])
        rows, negatives = groups(embeddings.image, self.config.group_size)
        losses = [
            self._pairing(image[here], text[here], t, negatives, masking.of(here))
            for image, text in product(images, texts)
            for here in rows
        ]
        loss = sum(losses[1:], losses[0]) / len(losses)
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _pairing(
        self, image: Tensor, text: Tensor, t: Tensor | float, negatives: Negatives, masks: dict[str, Any]
    ) -> Tensor:
        both = contrast(image, text, temperature=t, centred=True, negatives=negatives, **masks)
        smoothing = self.config.label_smoothing
        if not smoothing:
            return softmax_loss(both)
        x, y = at_least_float32(image), at_least_float32(text)
        mean_image = (x * column_mean(y, negatives=negatives)).sum(1)  # (b,), over all keys
        mean_text = (y * column_mean(x, negatives=negatives)).sum(1)
        spread = (2 * both.image.positive - mean_image - mean_text) * smoothing / t  # (b,), of both directions
        return softmax_loss(both) + spread.mean() / 2


def groups(rows: Tensor, size: int | None) -> tuple[list[slice], Negatives]:
    """How groups of `size` consecutive pairs of the global batch lie on the ranks.

    Args:
        rows: (b, ...), of this rank.

    Returns:
        The slices of this rank's rows that are contrasted one after another, and with which ranks.

    Raises:
        UserError: a group neither divides what a rank holds nor consists of whole ranks, or does not divide B.
    """
    b, B = len(rows), global_batch_size(rows)
    if size is None or size == B:
        return [slice(None)], "all"
    fits = B % size == 0 and (b % size == 0 or size % b == 0)
    require(
        fits,
        "group_size",
        f"a divisor of the global batch {B} that divides, or is a multiple of, the {b} of a rank",
        size,
    )
    if size <= b:
        return [slice(start, start + size) for start in range(0, b, size)], "local"
    return [slice(None)], size // b


def softmax_loss(both: Contrast) -> Tensor:
    """The value above without smoothing, from centred statistics: a tensor (), this rank's mean."""
    return (both.image.log_sum + both.text.log_sum).mean() / 2


def check_temperature(temperature: float | None) -> None:
    """Raise unless the temperature is positive or None (learned)."""
    expected = "a positive number, or null for a learned one"
    require(temperature is None or temperature > 0, "temperature", expected, temperature)
