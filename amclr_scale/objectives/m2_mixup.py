"""Geodesic multi-modal mixup: points between an image and its text are hard negatives of all other samples.

Oh et al., "Geodesic Multi-Modal Mixup for Robust Fine-Tuning", NeurIPS 2023, arXiv:2203.03897 (m2-mix).

With theta_j the angle between z_j and t_j, and one l of Beta(mix_beta, mix_beta) per step:

    m_j   = ( sin(l theta_j) z_j + sin((1 - l) theta_j) t_j ) / sin theta_j                        on the sphere
    M_i   = log(1 + sum_{j != i} exp((z_i.m_j - s_ii) / t_mix))                                    and M'_i with t_i.m_j
    value = CLIP + w mean_i (M_i + M'_i),            w = mix_weight, divided by the epoch's number if it is scheduled

l is drawn from how far training is (draws.py), alike on every rank and after a resume.

Numerics: the cosine is kept a few roundings away from -1 and 1; M_i is logaddexp(log-sum, 0), centred; float32.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.draws import Draws
from amclr_scale.objectives.masking import MaskOptions, limited
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class M2Mixup(Objective, name="m2_mixup"):
    """CLIP with negatives that lie between image and text."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `m2_mixup`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        mix_temperature: float = 0.07  # of the mixed negatives
        mix_weight: float = 0.01  # of their part
        mix_schedule: bool = True  # divide that by 1 + the epoch, from 0 on
        mix_beta: float = 0.5  # of the distribution of the place between image and text
        mix_seed: int = 0  # of its draws

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.mix_temperature > 0, "mix_temperature", "a positive number", self.mix_temperature)
            require(self.mix_weight >= 0, "mix_weight", "a weight of at least 0", self.mix_weight)
            # Python's draws of a Beta end at 0 too often below this range, and do not end far above it.
            require(0.01 <= self.mix_beta <= 1000, "mix_beta", "a number from 0.01 to 1000", self.mix_beta)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.draws = Draws()

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, config.temperature)
        both = contrast(image, text, temperature=t, centred=True, **self.masks(embeddings).of())
        positive = (image * text).sum(1)  # with a gradient into both, whatever a queue says of CLIP's keys
        masks = limited(config.masks(embeddings).of(), positive)  # a queue is CLIP's
        share = place(self.draws.words(config.mix_seed, self.epoch, learns=self.learns), config.mix_beta)
        mixed = between(image, text, positive, share)
        terms: list[Tensor] = []
        for anchors in (image, text):
            side = contrast(anchors, mixed, temperature=config.mix_temperature, exclude_positive=True, **masks).image
            margin = side.log_sum - positive / config.mix_temperature
            terms.append(torch.logaddexp(margin, torch.zeros_like(margin)))
        clip, mixup = softmax_loss(both), (terms[0] + terms[1]).mean()
        weight = config.mix_weight / (1 + math.floor(self.epoch)) if config.mix_schedule else config.mix_weight
        loss = clip + weight * mixup
        return Loss(loss, numbers(objective=loss, clip=clip, mixup=mixup, temperature=t))


def place(words: str, beta: float) -> float:
    """The share l of a step."""
    return random.Random(words).betavariate(beta, beta)


def between(image: Tensor, text: Tensor, cosine: Tensor, share: float) -> Tensor:
    """Points m (b, D) on the arcs from text (share 0) to image (share 1), given their cosines (b,)."""
    room = 8 * torch.finfo(cosine.dtype).eps
    theta = cosine.clamp(-1 + room, 1 - room).acos()[:, None]
    return ((share * theta).sin() * image + ((1 - share) * theta).sin() * text) / theta.sin()
