"""NegCLIP: captions that are wrong by one word are among the negatives of every image.

Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-of-Words, and What to Do about It?",
ICLR 2023, arXiv:2210.01936.

With K further captions n^k_j of every sample, made to be wrong (words swapped, an attribute, a number changed), of
those samples for which there are such:

    L_i   = log( sum_j exp(z_i.t_j / t) + sum_jk exp(z_i.n^k_j / t) ) - s_ii / t           keys: B texts, B K wrong ones
    L'_i  = log sum_j exp(z_j.t_i / t) - s_ii / t                                          as in CLIP
    value = (1/2) mean_i (L_i + L'_i)

Numerics: 1 + K contrasts, joined by logaddexp, centred on the positive; wrong captions have gradients; float32. Those
that there are not are masked out before any exponential.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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
        return {**read_by_masks(options), "text_negatives": options.negatives, "text_negative_mask": True}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + int(options.negatives) * B

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        loss = with_wrong_captions(embeddings, self.config.negatives, t, self.masks(embeddings).of())
        return Loss(loss, numbers(objective=loss, temperature=t))


def with_wrong_captions(embeddings: Embeddings, K: int, t: Tensor | float, masks: Mapping[str, Any]) -> Tensor:
    """The value above, of K wrong captions of each sample: (), this rank's mean."""
    both = contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks)
    log_sum = both.image.log_sum
    for wrong, there in wrong_captions(embeddings, K):
        # Keys that are not there are in the group of every anchor; the anchor's own key is added by itself.
        more = contrast(
            embeddings.image, wrong, temperature=t, exclude_positive=True,
            image_groups=torch.zeros_like(there, dtype=torch.int64), text_groups=there.long(),
        ).image  # fmt: skip
        own = torch.where(there, more.positive / t, -torch.inf)
        for term in (more.log_sum, own):
            log_sum = torch.logaddexp(log_sum, term - both.image.positive / t)
    return (log_sum + both.text.log_sum).mean() / 2


def wrong_captions(embeddings: Embeddings, K: int) -> list[tuple[Tensor, Tensor]]:
    """K times: embeddings of wrong captions (b, D), and which samples have one (b,)."""
    there = embeddings.text_negative_mask.to(embeddings.image.device).unbind(1)
    return list(zip(embeddings.text_negatives[:K], there[:K], strict=True))
