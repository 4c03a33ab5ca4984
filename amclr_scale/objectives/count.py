"""Counting: an image must prefer its caption to the same caption with another number.

Paiss et al., "Teaching CLIP to Count to Ten", ICCV 2023, arXiv:2302.12066.

With t'_i the caption of sample i in which a number is another one, and C the samples whose caption has a number:

    value = CLIP + count_weight mean_{i in C} log(1 + exp(z_i.t'_i - s_ii))                 no temperature in this part

Of the K wrong captions of a sample all count that there are, one by one; without any in the batch this part is 0.

Numerics: the part of each pair is logaddexp(difference, 0); the mean is over the global batch; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import all_sum, contrast, world_size
from amclr_scale.types import Embeddings, Loss


class Count(Objective, name="count"):
    """CLIP, and a term in which every image meets its own caption with another number."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `count`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        count_weight: float = 1.0  # of the counting part
        negatives: int = 1  # K, captions of a sample with another number

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.count_weight >= 0, "count_weight", "a weight of at least 0", self.count_weight)
            require(1 <= self.negatives <= 16, "negatives", "1 to 16 wrong captions of a sample", self.negatives)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "text_negatives": options.negatives, "text_negative_mask": True}

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
        both = contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks)
        clip, there = softmax_loss(both), embeddings.text_negative_mask[:, : config.negatives]
        terms: list[Tensor] = []
        for wrong in embeddings.text_negatives[: config.negatives]:
            margin = (at_least_float32(embeddings.image) * at_least_float32(wrong)).sum(1) - both.image.positive
            terms.append(torch.logaddexp(margin, torch.zeros_like(margin)))
        each = torch.where(there.to(clip.device), torch.stack(terms, 1), 0.0)
        pairs = all_sum(there.sum().to(each))
        count = each.sum() * world_size() / pairs.clamp(min=1)
        loss = clip + config.count_weight * count
        return Loss(loss, numbers(objective=loss, clip=clip, count=count, pairs=pairs, temperature=t))
