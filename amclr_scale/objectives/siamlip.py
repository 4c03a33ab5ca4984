"""SiamLIP: an image's embedding predicts its text's, and the other way round; no negatives.

Fini et al., "Improved Baselines for Vision-Language Pre-training", TMLR 2023, arXiv:2305.08675, after Chen and He,
"Exploring Simple Siamese Representation Learning", CVPR 2021, arXiv:2011.10566.

With a predictor P for each modality, and nothing learned through what is predicted:

    value = clip CLIP + (1/2) mean_i ( 2 - 2 cos(P(z_i), stop t_i) + 2 - 2 cos(P'(t_i), stop z_i) )

Row by row: the loss does not depend on the batch.

Numerics: cosines in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.objectives.base import at_least_float32, require
from amclr_scale.objectives.beside_clip import BesideCLIP, BesideOptions
from amclr_scale.types import Embeddings, Loss


class Heads(nn.Module):
    """A small network per modality: its outputs are `image_<name>` and `text_<name>`."""

    def __init__(self, name: str, width: int, hidden: int, out: int):
        super().__init__()
        self.name = name
        self.image, self.text = (
            nn.Sequential(nn.Linear(width, hidden), nn.LayerNorm(hidden), nn.ReLU(), nn.Linear(hidden, out))
            for _ in range(2)
        )

    def forward(self, outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        sides = (("image", self.image), ("text", self.text))
        return {f"{side}_{self.name}": head(outputs[side]) for side, head in sides if side in outputs}


@dataclass(frozen=True, kw_only=True)
class PredictOptions(BesideOptions):
    """Options of objectives that predict."""

    predict_weight: float = 1.0  # weight of the prediction
    hidden: int = 2048  # width of the predictors' inner layer

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("clip", "predict_weight"):
            require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))
        require(self.hidden > 0, "hidden", "a width of at least 1", self.hidden)


def missed(embeddings: Embeddings, image: Tensor, text: Tensor) -> Tensor:
    """How far predictions are from the other modality's targets (b, D), through which nothing is learned: ()."""
    pairs = ((embeddings.image_predicted, text), (embeddings.text_predicted, image))
    sides = [2 - 2 * F.cosine_similarity(at_least_float32(p), at_least_float32(x.detach())) for p, x in pairs]
    return (sides[0] + sides[1]).mean() / 2


class SiamLIP(BesideCLIP, name="siamlip"):
    """Prediction of the other modality's embedding, without negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PredictOptions):
        """Options of `siamlip`."""

    config: Config

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Heads("predicted", width, options.hidden, width)

    def forward(self, embeddings: Embeddings) -> Loss:
        predict = missed(embeddings, embeddings.image, embeddings.text)
        return self.with_clip(embeddings, self.config.predict_weight, predict=predict)
