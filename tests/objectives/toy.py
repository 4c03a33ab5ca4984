"""Objectives in a file outside the package, as a stranger would write them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.objectives.base import Objective, numbers, require
from amclr_scale.objectives.clip import softmax_loss
from amclr_scale.objectives.sogclr import SogCLR
from amclr_scale.similarity import column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class Parts(nn.Module):
    """A predictor of each sample's other view, and prototypes that all samples share."""

    def __init__(self, width: int, prototypes: int):
        super().__init__()
        self.predict = nn.Linear(width, width)
        self.prototypes = nn.Parameter(torch.randn(prototypes, width))

    def forward(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        made = {f"{side}_predicted": self.predict(outputs[side]) for side in ("image", "text") if side in outputs}
        return {**made, "shared": {"prototypes": self.prototypes}}


class Toy(Objective, name="toy"):
    """CLIP, a predictor of two further views, and embeddings that are pulled to prototypes."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `toy`."""

        prototypes: int = 8
        pull: float = 0.1  # weight of both

        def __post_init__(self) -> None:
            require(self.prototypes > 0, "prototypes", "at least 1", self.prototypes)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {"image_views": ("near", "far")}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 + options.prototypes

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Parts(width, options.prototypes)

    def forward(self, embeddings: Embeddings) -> Loss:
        clip = softmax_loss(contrast(embeddings.image, embeddings.text, temperature=0.1, centred=True))
        seen = (embeddings.near + 2 * embeddings.far) / 3
        missed = sum(
            (F.normalize(rows, dim=1) - seen).square().sum(1).mean()
            for rows in (embeddings.image_predicted, embeddings.text_predicted)
        )
        prototypes = F.normalize(embeddings.prototypes, dim=1)
        share = column_mean((embeddings.image @ prototypes.T).softmax(1))  # (M,), over all ranks
        loss = clip + self.config.pull * (missed + share.square().sum())
        return Loss(loss, numbers(objective=loss, clip=clip))


class Softer(SogCLR, name="softer"):
    """SogCLR at another temperature: everything else is inherited."""

    @dataclass(frozen=True, kw_only=True)
    class Config(SogCLR.Config):
        """Options of `softer`."""

        temperature: float = 0.2

    def forward(self, embeddings: Embeddings) -> Loss:
        found: Loss = super().forward(embeddings)
        value: Tensor = found.value / 2
        return Loss(value, found.metrics)
