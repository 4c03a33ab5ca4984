"""CLIP plus alignment, uniformity and cross-modal uniformity: terms that close the gap between modalities.

Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere", ICML 2020, arXiv:2005.10242, gives alignment and uniformity. Their use beside CLIP, with the cross-modal
term, is Fahim et al., "It's Not a Modality Gap: Characterizing and Addressing the Contrastive Gap", 2024,
arXiv:2405.18570.

With unit rows z_i, t_i of all ranks:

    alignment         mean_i |z_i - t_i|^2
    uniformity        log mean_{j != k} exp(-2 |z_j - z_k|^2), averaged over the two modalities
    cross-uniformity  log mean_{j != k} exp(-2 |z_j - t_k|^2)
    value             CLIP + the three, weighted

On unit rows exp(-2 |x - y|^2) = exp(4 x.y - 4), so each mean is a contrast at temperature 1/4.

Numerics: the exponents lie in [-8, 0], so nothing overflows; log-sums are float32.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class Uniformity(Objective, name="uniformity"):
    """CLIP with alignment, uniformity and cross-modal uniformity."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `uniformity`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        alignment: float = 1.0  # weight of the distance between the embeddings of a pair
        uniformity: float = 1.0  # weight of the uniformity inside modalities
        cross_uniformity: float = 1.0  # weight of the uniformity between modalities

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            for key in ("alignment", "uniformity", "cross_uniformity"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        config, image, text = self.config, embeddings.image, embeddings.text
        t = learned_temperature(embeddings, config.temperature)
        both = contrast(image, text, temperature=t, centred=True, **self.masks(embeddings).of())
        clip = softmax_loss(both)
        pairs = at_least_float32(image) * at_least_float32(text)  # with gradients into both, whatever CLIP's keys have
        align = (2 - 2 * pairs.sum(1)).mean()
        uniform = (log_mean_potential(image, image) + log_mean_potential(text, text)) / 2
        cross = log_mean_potential(image, text)
        loss = clip + config.alignment * align + config.uniformity * uniform + config.cross_uniformity * cross
        return Loss(
            loss,
            numbers(
                objective=loss, clip=clip, alignment=align, uniformity=uniform, cross_uniformity=cross, temperature=t
            ),
        )


def log_mean_potential(x: Tensor, y: Tensor) -> Tensor:
    """The log of mean_{j != k} exp(-2 |x_j - y_k|^2) over all ranks' unit rows: a tensor (), the same on every rank."""
    both = contrast(x, y, temperature=0.25, exclude_positive=True)
    per_row = (both.image.log_sum - 4 - math.log(both.num_keys)).exp()  # (b,) mean over k
    return column_mean(per_row[:, None]).log().squeeze()
