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

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast
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


class SiamLIP(Objective, name="siamlip"):
    """Prediction of the other modality's embedding, without negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `siamlip`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        clip: float = 1.0  # weight of CLIP's part; 0: no negatives at all
        predict_weight: float = 1.0  # weight of the prediction
        hidden: int = 2048  # width of the predictors' inner layer

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            for key in ("clip", "predict_weight"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))
            require(self.hidden > 0, "hidden", "a width of at least 1", self.hidden)

    config: Config

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 if options.clip else 0

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Heads("predicted", width, options.hidden, width)

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        pairs = ((embeddings.image_predicted, embeddings.text), (embeddings.text_predicted, embeddings.image))
        missed = [2 - 2 * F.cosine_similarity(at_least_float32(p), at_least_float32(x.detach())) for p, x in pairs]
        predict = (missed[0] + missed[1]).mean() / 2
        loss, found = config.predict_weight * predict, {"predict": predict}
        if config.clip:
            t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
            clip = softmax_loss(contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks))
            loss, found = loss + config.clip * clip, {**found, "clip": clip}
        return Loss(loss, numbers(objective=loss, **found))
