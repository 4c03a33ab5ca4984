"""1-to-K: one image and its K texts, in K languages or as K captions, are learned alike.

Nie et al., "Improving the Consistency in Cross-Lingual Cross-Modal Retrieval with 1-to-K Contrastive Learning",
KDD 2024, arXiv:2406.18254.

With texts t^1 ... t^K of every image, logits x_i,jk = z_i . t^k_j / t:

    L_i   = log sum_jk exp(x_i,jk) - (1/K) sum_k x_i,ik            image anchors, all B K texts as keys
    L'_ik = log sum_j exp(x_j,ik) - x_i,ik                         text anchors, the B images as keys
    value = (1/2) ( mean_i L_i + mean_ik L'_ik )

`siblings: mask` takes an image's other texts out of the denominator of each: L_i is then the mean over k of
log(1 + exp(L^N_i - x_i,ik)), as in the decoupled softmax.

Numerics: K contrasts, joined by logaddexp, centred on the first text; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.decoupled import above_negatives
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss

NOTHING = -1e5  # the log-sum of no key at all, so that it has a gradient: 0


class OneToK(Objective, name="one_to_k"):
    """Softmax loss of an image against all its texts at once, and of each text against images."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `one_to_k`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        texts: int = 2  # K, the text and its further views
        siblings: Literal["keep", "mask"] = "keep"  # an image's other texts in the denominators: as published

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(1 <= self.texts <= 9, "texts", "1 to 9 texts of an image", self.texts)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "text_views": options.texts - 1}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return int(options.texts) * (B - 1)

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        masks, keep = self.masks(embeddings).of(), config.siblings == "keep"
        log_sums: list[Tensor] = []  # (b,) each, of images, less the logit of the pair that it names
        pairs: list[Tensor] = []  # (b,) each, their similarities
        of_texts: list[Tensor] = []
        for text in (embeddings.text, *embeddings.text_views[: config.texts - 1]):
            both = contrast(embeddings.image, text, temperature=t, centred=True, exclude_positive=not keep, **masks)
            log_sums.append(both.image.log_sum)
            pairs.append(both.image.positive)
            row = both.text.log_sum
            of_texts.append(row if keep else torch.logaddexp(row, torch.zeros_like(row)))
            masks = {**masks, "extra_text_keys": None}  # an image meets a queue's texts once

        # All less the logit of the first text.
        moved = [x.clamp(min=NOTHING) + (pair - pairs[0]) / t for x, pair in zip(log_sums, pairs, strict=True)]
        log_sum = torch.stack(moved).logsumexp(0)
        if keep:
            of_image = log_sum - (torch.stack(pairs).mean(0) - pairs[0]) / t
        else:
            each = torch.as_tensor(t, dtype=log_sum.dtype, device=log_sum.device)
            of_image = torch.stack([above_negatives(pair, log_sum, pairs[0], each) for pair in pairs]).mean(0)
        loss = (of_image.mean() + torch.stack(of_texts).mean()) / 2
        return Loss(loss, numbers(objective=loss, temperature=t))
