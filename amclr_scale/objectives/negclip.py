"""NegCLIP: captions that are wrong by one word are among the negatives of every image.

Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-of-Words, and What to Do about It?",
ICLR 2023, arXiv:2210.01936.

With K further captions n^k_j of every sample, made to be wrong (words swapped, an attribute, a number changed):

    L_i   = log( sum_j exp(z_i.t_j / t) + sum_jk exp(z_i.n^k_j / t) ) - s_ii / t           keys: B texts, B K wrong ones
    L'_i  = log sum_j exp(z_j.t_i / t) - s_ii / t                                          as in CLIP
    value = (1/2) mean_i (L_i + L'_i)

Numerics: 1 + K contrasts, joined by logaddexp, centred on the positive; wrong captions have gradients; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class NegCLIP(Objective, name="negclip"):
    """CLIP whose images also meet captions that are wrong on purpose."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `negclip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        negatives: int = 1  # K, wrong captions of every sample

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(1 <= self.negatives <= 16, "negatives", "1 to 16 wrong captions of a sample", self.negatives)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "text_negatives": options.negatives}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + int(options.negatives) * B

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        masks = self.masks(embeddings).of()
        both = contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks)
        log_sum = both.image.log_sum
        for wrong in embeddings.text_negatives[: self.config.negatives]:
            more = contrast(embeddings.image, wrong, temperature=t).image
            log_sum = torch.logaddexp(log_sum, more.log_sum - both.image.positive / t)
        loss = (log_sum + both.text.log_sum).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))
