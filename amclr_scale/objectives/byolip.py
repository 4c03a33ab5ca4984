"""BYOLIP: an image's embedding predicts what a moving average of the towers makes of its text, and the other way round.

Fini et al., "Improved Baselines for Vision-Language Pre-training", TMLR 2023, arXiv:2305.08675, after Grill et al.,
"Bootstrap Your Own Latent", NeurIPS 2020, arXiv:2006.07733.

With a predictor P for each modality, and z^m, t^m of the moving average:

    value = clip CLIP + (1/2) mean_i ( 2 - 2 cos(P(z_i), t^m_i) + 2 - 2 cos(P'(t_i), z^m_i) )

Row by row: the loss does not depend on the batch.

Numerics: cosines in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.beside_clip import BesideCLIP
from amclr_scale.objectives.siamlip import Heads, PredictOptions, missed
from amclr_scale.types import Embeddings, Loss


class BYOLIP(BesideCLIP, name="byolip"):
    """Prediction of a moving average's embedding of the other modality, without negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PredictOptions):
        """Options of `byolip`."""

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "image_momentum": True, "text_momentum": True}

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Heads("predicted", width, options.hidden, width)

    def forward(self, embeddings: Embeddings) -> Loss:
        predict = missed(embeddings, embeddings.image_momentum, embeddings.text_momentum)
        return self.with_clip(embeddings, self.config.predict_weight, predict=predict)
