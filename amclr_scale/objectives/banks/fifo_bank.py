"""A first-in, first-out bank of past features as further negatives: more of them than the batch holds.

The bank without a momentum encoder of the notes "Increasing negative examples for ITC"; for one modality it is Wang et
al., "Cross-Batch Memory for Embedding Learning", CVPR 2020, arXiv:1912.06798.

With logits l_ij = s_ij / t of image anchors i over the texts j of the batch, l_ik = z_i . q'_k / t over the rows q'_k
of the text bank that are not of sample i, and q_i, q'_i the newest rows of sample i itself:

    L_i   = log( sum_j exp(l_ij) + sum_k exp(l_ik) ) - l_ii
    value = (1/2) mean_i (L_i + L'_i) + (proximal/2) mean_i ( |z_i - q_i|^2 + |t_i - q'_i|^2 )

A pair of which the bank holds nothing adds nothing to the proximal term; that is most of them, but for small data sets
and at the borders of epochs. Rows of the bank get no gradient. After the loss the batch, or what the momentum encoder
made of it, takes the place of the oldest rows (bank.py).

Stored rows push their anchors, yet nothing pushes them: as keys of the batch, positives are pulled with their full
weight and pushed with the batch's share of it, so that all embeddings drift together. `key_gradient` false takes both
away. Young towers drift all the same: for the first `wait_epochs` passes over the data rows are stored, and are no
negatives yet.

Numerics: as in CLIP; the bank's rows join the same running log-sum.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from amclr_scale.declarations import Equal
from amclr_scale.objectives.banks.queues import BankOptions, KeepsQueues, ids_of, proximal
from amclr_scale.objectives.base import learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.layers import LayerOptions
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class FIFOBank(KeepsQueues, name="fifo_bank"):
    """CLIP with a bank of past features as further negatives, without gradient into them."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"size": 0}

    @dataclass(frozen=True, kw_only=True)
    class Config(BankOptions, LayerOptions):
        """Options of `fifo_bank`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        key_gradient: bool = (
            True  # false: neither the batch's keys nor positives as keys get one, as stored ones get none
        )
        proximal: float = 0.0  # weight of the squared distance to what the sample has stored last
        source: Literal["student", "momentum"] = "student"  # whose features are stored; momentum: model.momentum's

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(self.proximal >= 0, "proximal", "a weight of at least 0", self.proximal)
            super().__post_init__()

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        momentum = options.source == "momentum"
        return {"ids": True, "image_momentum": momentum, "text_momentum": momentum}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + int(options.size)

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        if options.size or not options.key_gradient:
            return None
        return Equal("clip", {"temperature": options.temperature}, "a bank without slots adds nothing")

    def forward(self, embeddings: Embeddings) -> Loss:
        t, ids = learned_temperature(embeddings, self.config.temperature), ids_of(embeddings)
        image, text = embeddings.image, embeddings.text
        stored = (image, text)
        if self.config.source == "momentum":
            stored = (embeddings.image_momentum, embeddings.text_momentum)
        look = self.bank.look(*stored, ids, self.epoch)
        both = contrast(
            image, text, temperature=t, centred=True,
            extra_image_keys=look.extra_images, extra_text_keys=look.extra_texts,
            key_gradient=self.config.key_gradient,
        )  # fmt: skip
        loss = softmax_loss(both)
        if self.config.proximal:
            near = (proximal(image, look.image) + proximal(text, look.text)) / 2
            loss = loss + self.config.proximal * near
        if self.learns:
            self.bank.put(*stored, ids)
        return Loss(loss, numbers(objective=loss, temperature=t, **look.metrics))
