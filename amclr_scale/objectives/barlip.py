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

from torch import Tensor, nn

from amclr_scale.objectives.base import (
    at_least_float32,
    global_batch_size,
    require,
)
from amclr_scale.objectives.beside_clip import BesideCLIP, BesideOptions
from amclr_scale.objectives.siamlip import Heads
from amclr_scale.similarity import column_mean, gram
from amclr_scale.types import Embeddings, Loss

LEAST = 1e-5  # added to variances


class BarLIP(BesideCLIP, name="barlip"):
    """Cross-correlation of the two modalities' coordinates, without negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BesideOptions):
        """Options of `barlip`."""

        weight: float = 0.025  # weight of the correlations
        redundancy: float = 0.005  # of the correlations between different coordinates, beside 1
        coordinates: int = 8192  # P, coordinates that are compared
        hidden: int = 3000  # width of the heads' inner layer

        def __post_init__(self) -> None:
            super().__post_init__()
            for key in ("clip", "weight", "redundancy"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))
            for key in ("coordinates", "hidden"):
                require(getattr(self, key) > 0, key, "at least 1", getattr(self, key))

    config: Config

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
        return self.with_clip(embeddings, config.weight, decorrelation=decorrelation)


def standard(x: Tensor) -> Tensor:
    """Columns of mean 0 and variance 1 over all ranks' rows."""
    centred = x - column_mean(x)
    return centred / (column_mean(centred.square()) + LEAST).sqrt()
