"""DeGLA: wrong captions as negatives, twice more inside each sample, and not far from a moving average of the towers.

Hu et al., "Decoupled Global-Local Alignment for Improving Compositional Understanding", 2025, arXiv:2504.16801.

With n^k_i the K wrong captions of sample i (those that there are), z^m, t^m the moving average's features:

    I_i   = log( exp(s_ii / t) + sum_k exp(z_i.n^k_i / t) ) - s_ii / t                             image-grounded
    T_i   = log( exp(t_i.t^m_i / t') + sum_k exp(t_i.n^k_i / t') ) - t_i.t^m_i / t'                text-grounded
    D_i   = |z_i - z^m_i|^2 + |t_i - t^m_i|^2                                                      distillation
    value = NegCLIP + image_weight mean_i I_i + text_weight mean_i T_i + distill_weight mean_i D_i

I, T and D are row by row. The authors' D is a sum over the batch, which grows with it, with the weight 0.005; and the
average encodes wrong captions too.

Numerics: log-sums by logaddexp, centred on the positive; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.objectives.negclip import with_wrong_captions, wrong_captions
from amclr_scale.types import Embeddings, Loss


class DeGLA(Objective, name="degla"):
    """NegCLIP with contrasts inside each sample and distillation from a moving average."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `degla`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        negatives: int = 4  # K, wrong captions of every sample
        image_weight: float = 0.1  # of an image against its own wrong captions
        text_weight: float = 0.1  # of a caption against its own wrong ones
        text_temperature: float = 0.1  # there
        distill_weight: float = 1.0  # of the squared distance from the moving average

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(1 <= self.negatives <= 16, "negatives", "1 to 16 wrong captions of a sample", self.negatives)
            for key in ("image_weight", "text_weight", "distill_weight"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))
            require(self.text_temperature > 0, "text_temperature", "a positive number", self.text_temperature)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        hard = {"text_negatives": options.negatives, "text_negative_mask": True}
        return {**read_by_masks(options), **hard, "image_momentum": True, "text_momentum": True}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + int(options.negatives) * B

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        negclip = with_wrong_captions(embeddings, config.negatives, t, self.masks(embeddings).of())
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        image_before, text_before = (
            at_least_float32(x.detach()) for x in (embeddings.image_momentum, embeddings.text_momentum)
        )
        wrong = wrong_captions(embeddings, config.negatives)
        of_image = against_own(image, text, wrong, t).mean()
        of_text = against_own(text, text_before, wrong, config.text_temperature).mean()
        distance = ((image - image_before).square() + (text - text_before).square()).sum(1).mean()
        loss = negclip + config.image_weight * of_image + config.text_weight * of_text
        loss = loss + config.distill_weight * distance
        found = {"negclip": negclip, "image_grounded": of_image, "text_grounded": of_text, "distance": distance}
        return Loss(loss, numbers(objective=loss, **found, temperature=t))


def against_own(anchors: Tensor, positives: Tensor, wrong: list[tuple[Tensor, Tensor]], t: Tensor | float) -> Tensor:
    """(b,): the softmax loss of each anchor's positive among the wrong captions of its own sample."""
    positive = (anchors * positives).sum(1)
    log_sum = torch.zeros_like(positive)
    for captions, there in wrong:
        margin = ((anchors * at_least_float32(captions)).sum(1) - positive) / t
        log_sum = torch.logaddexp(log_sum, torch.where(there, margin, -torch.inf))
    return log_sum
