"""NegCLIP: captions that are wrong by one word are among the negatives of every image; and images that look like it.

Yuksekgonul et al., "When and Why Vision-Language Models Behave like Bags-of-Words, and What to Do about It?",
ICLR 2023, arXiv:2210.01936.

With K further captions n^k_j of every sample, made to be wrong (words swapped, an attribute, a number changed), of
those samples for which there are such:

    L_i   = log( sum_j exp(z_i.t_j / t) + sum_jk exp(z_i.n^k_j / t) ) - s_ii / t           keys: B texts, B K wrong ones
    L'_i  = log sum_j exp(z_j.t_i / t) - s_ii / t                                          as in CLIP
    value = (1/2) mean_i (L_i + L'_i)

With K' further pictures of every sample that its caption does not show (`image_negatives`), L' has these among its keys
as L has the wrong captions. The authors take a similar sample as a whole into the batch, picture, caption and wrong
caption: of those, this is the picture.

Numerics: 1 + K + K' contrasts, joined by logaddexp, centred on the positive; hard negatives have gradients; float32.
Those that there are not are masked out before any exponential.
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
from amclr_scale.similarity import Side, contrast
from amclr_scale.types import Embeddings, Loss


class NegCLIP(Objective, name="negclip"):
    """CLIP whose images also meet captions that are wrong on purpose."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `negclip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        negatives: int = 1  # K, wrong captions of every sample
        image_negatives: int = 0  # K', wrong pictures of every sample

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(1 <= self.negatives <= 16, "negatives", "1 to 16 wrong captions of a sample", self.negatives)
            fits = 0 <= self.image_negatives <= 16
            require(fits, "image_negatives", "0 to 16 wrong pictures of a sample", self.image_negatives)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        captions = {"text_negatives": options.negatives, "text_negative_mask": True}
        pictures = options.image_negatives
        return {
            **read_by_masks(options), **captions, "image_negatives": pictures, "image_negative_mask": bool(pictures),
        }  # fmt: skip

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + max(int(options.negatives), int(options.image_negatives)) * B  # of images, of captions

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        K, pictures = self.config.negatives, self.config.image_negatives
        loss = with_wrong_captions(embeddings, K, t, self.masks(embeddings).of(), pictures=pictures)
        return Loss(loss, numbers(objective=loss, temperature=t))


def with_wrong_captions(
    embeddings: Embeddings, K: int, t: Tensor | float, masks: Mapping[str, Any], *, pictures: int = 0
) -> Tensor:
    """The value above, of K wrong captions and so many wrong pictures of each sample: (), this rank's mean."""
    both = contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks)
    log_sum = _with(wrong_captions(embeddings, K), embeddings.image, both.image, t)
    other = both.text.log_sum
    if pictures:
        other = _with(_there(embeddings, "image", pictures), embeddings.text, both.text, t)
    return (log_sum + other).mean() / 2


def _with(wrong: list[tuple[Tensor, Tensor]], anchors: Tensor, side: Side, t: Tensor | float) -> Tensor:
    """(b,): the log-sums of a side with further keys of every sample, some of which there are not."""
    log_sum = side.log_sum
    for keys, there in wrong:
        # Keys that are not there are in the group of every anchor; the anchor's own key is added by itself.
        more = contrast(
            anchors, keys, temperature=t, exclude_positive=True,
            image_groups=torch.zeros_like(there, dtype=torch.int64), text_groups=there.long(),
        ).image  # fmt: skip
        own = torch.where(there, more.positive / t, -torch.inf)
        for term in (more.log_sum, own):
            log_sum = torch.logaddexp(log_sum, term - side.positive / t)
    return log_sum


def wrong_captions(embeddings: Embeddings, K: int) -> list[tuple[Tensor, Tensor]]:
    """K times: embeddings of wrong captions (b, D), and which samples have one (b,)."""
    return _there(embeddings, "text", K)


def _there(embeddings: Embeddings, side: str, K: int) -> list[tuple[Tensor, Tensor]]:
    there = getattr(embeddings, f"{side}_negative_mask").to(embeddings.image.device).unbind(1)
    return list(zip(getattr(embeddings, f"{side}_negatives")[:K], there[:K], strict=True))
