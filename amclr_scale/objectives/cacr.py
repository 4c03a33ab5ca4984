"""CACR: an anchor is attracted most by its farthest positive and repelled most by its nearest negative.

Zheng et al., "Contrastive Attraction and Contrastive Repulsion for Representation Learning", TMLR 2023,
arXiv:2105.03746.

With d = |z - k|^2 = 2 - 2 s on unit rows, positives p of an anchor (its text, and further views of it), negatives j:

    CA_i  = sum_p softmax_p(t+ d_ip) d_ip                 CR_i = -sum_{j != i} softmax_j(-t- d_ij) d_ij
    value = (1/2) mean_i ( attraction CA_i + repulsion CR_i + the same for texts )

Both softmaxes are differentiated, as in the authors' code. No logarithm, no temperature to learn.

Numerics: distances in float32, one block for both directions; d lies in [0, 4].
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, global_batch_size, numbers, refuse_unread, require
from amclr_scale.similarity import softmaxes
from amclr_scale.types import Embeddings, Loss


class CACR(Objective, name="cacr"):
    """Weighted attraction of positives and repulsion of negatives, without a softmax loss."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `cacr`."""

        omega: int = 0  # further views per modality, which are positives too
        positive_sharpness: float = 1.0  # t+: how much more a far positive attracts
        negative_sharpness: float = 2.0  # t-: how much more a near negative repels
        attraction: float = 1.0  # weights of the two
        repulsion: float = 1.0

        def __post_init__(self) -> None:
            require(0 <= self.omega <= 8, "omega", "0 to 8 further views per modality", self.omega)
            for key in ("positive_sharpness", "negative_sharpness", "attraction", "repulsion"):
                require(getattr(self, key) >= 0, key, "a number of at least 0", getattr(self, key))
            refuse_unread(self, () if self.omega else ("positive_sharpness",), "an omega of 1 or more")

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {"image_views": options.omega, "text_views": options.omega}

    def forward(self, embeddings: Embeddings) -> Loss:
        config, omega = self.config, self.config.omega
        require(global_batch_size(embeddings.image) > 1, "batch", "at least 2 samples, for a negative to exist", 1)
        images = [at_least_float32(x) for x in (embeddings.image, *embeddings.image_views[:omega])]
        texts = [at_least_float32(x) for x in (embeddings.text, *embeddings.text_views[:omega])]
        sides = ((images[0], texts), (texts[0], images))
        attraction = torch.stack([self._attraction(anchors, keys).mean() for anchors, keys in sides]).mean()
        near = softmaxes(self._distances, (images[0],), (texts[0],), expected=True, exclude_positive=True)
        repulsion = -torch.stack([side.expected.mean() for side in near]).mean()
        loss = config.attraction * attraction + config.repulsion * repulsion
        return Loss(loss, numbers(objective=loss, attraction=attraction, repulsion=repulsion))

    def _attraction(self, anchors: Tensor, positives: list[Tensor]) -> Tensor:
        d = torch.stack([2 - 2 * (anchors * x).sum(1) for x in positives], 1)  # (b, 1 + omega)
        return ((self.config.positive_sharpness * d).softmax(1) * d).sum(1)

    def _distances(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and of what they are the softmax."""
        d = 2 - 2 * s
        return -self.config.negative_sharpness * d, d
