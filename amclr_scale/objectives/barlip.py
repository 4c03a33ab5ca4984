"""BarLIP: coordinates of images and texts correlate one by one, and not with one another; no negatives.

Fini et al., "Improved Baselines for Vision-Language Pre-training", TMLR 2023, arXiv:2305.08675, after Zbontar et al.,
"Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021, arXiv:2103.03230.

With V, V' (B, P) what a head per modality makes of the embeddings, each column brought to mean 0 and variance 1 over
the global batch:

    C     = V^T V' / B                                        (P, P)
    value = clip CLIP + weight ( sum_k (C_kk - 1)^2 + redundancy sum_{k != l} C_kl^2 )

Numerics: columns are centred before they are multiplied; P x P sums in float32, never B x B.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.objectives.siamlip import Heads
from amclr_scale.similarity import column_mean, contrast, gram
from amclr_scale.types import Embeddings, Loss

LEAST = 1e-5  # added to variances


class BarLIP(Objective, name="barlip"):
    """Cross-correlation of the two modalities' coordinates, without negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `barlip`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        clip: float = 1.0  # weight of CLIP's part; 0: no negatives at all
        weight: float = 0.025  # weight of the correlations
        redundancy: float = 0.005  # of the correlations between different coordinates, beside 1
        coordinates: int = 8192  # P, coordinates that are compared
        hidden: int = 3000  # width of the heads' inner layer

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            for key in ("clip", "weight", "redundancy"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))
            for key in ("coordinates", "hidden"):
                require(getattr(self, key) > 0, key, "at least 1", getattr(self, key))

    config: Config

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 if options.clip else 0

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Heads("projected", width, options.hidden, options.coordinates)

    def forward(self, embeddings: Embeddings) -> Loss:
        config, B = self.config, global_batch_size(embeddings.image)
        require(B > 1, "batch", "at least 2 samples, for a variance to exist", B)
        image, text = (standard(at_least_float32(x)) for x in (embeddings.image_projected, embeddings.text_projected))
        correlations = gram(image, text) / B  # (P, P), the same on every rank
        own = correlations.diagonal()
        others = correlations.square().sum() - own.square().sum()
        decorrelation = (own - 1).square().sum() + config.redundancy * others
        loss, found = config.weight * decorrelation, {"decorrelation": decorrelation}
        if config.clip:
            t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
            clip = softmax_loss(contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks))
            loss, found = loss + config.clip * clip, {**found, "clip": clip}
        return Loss(loss, numbers(objective=loss, **found))


def standard(x: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1 over all ranks' rows."""
    centred = x - column_mean(x)
    return centred / (column_mean(centred.square()) + LEAST).sqrt()
