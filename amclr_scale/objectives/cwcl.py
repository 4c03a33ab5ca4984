"""CWCL: every text is a positive of an image as far as a frozen model finds their images alike.

Srinivasa et al., "CWCL: Cross-Modal Transfer with Continuously Weighted Contrastive Loss", NeurIPS 2023,
arXiv:2309.14580.

With p_i the unit features of a frozen model for sample i, w_ij = (1 + p_i.p_j) / 2:

    L_i   = log sum_j exp(s_ij / t) - sum_j w_ij s_ij / (t sum_j w_ij)         anchors of the modality that p is of
    L'_i  = log sum_j exp(s_ji / t) - s_ii / t                                 the other one's, as in CLIP
    value = (1/2) mean_i (L_i + L'_i)

Of the weights only moments are needed: with C = sum_j t_j p_j^T (D x R),

    sum_j w_ij s_ij = (1/2) ( z_i.C p_i + z_i.sum_j t_j ),      sum_j w_ij = (1/2) ( p_i.sum_j p_j + B )

Numerics: log-sums centred on the positive; moments in float32 over the global batch.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
)
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.similarity import column_mean, contrast, gram
from amclr_scale.types import Embeddings, Loss


class CWCL(Objective, name="cwcl"):
    """CLIP with soft targets from a frozen model of one modality, without a matrix of weights."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `cwcl`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        reference: Literal["image", "text", "both"] = "image"  # whose frozen features weigh whose anchors' keys

        def __post_init__(self) -> None:
            check_temperature(self.temperature)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {f"{side}_reference": options.reference in (side, "both") for side in ("image", "text")}

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        both = contrast(image, text, temperature=t, centred=True)
        terms: list[Tensor] = []
        for name, side, anchors, keys in (("image", both.image, image, text), ("text", both.text, text, image)):
            term = side.log_sum
            if self.config.reference in (name, "both"):
                reference = F.normalize(at_least_float32(getattr(embeddings, f"{name}_reference")), dim=1)
                term = term - (weighted_mean(anchors, keys, reference) - side.positive) / t
            terms.append(term)
        loss = (terms[0] + terms[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))


def weighted_mean(anchors: Tensor, keys: Tensor, reference: Tensor) -> Tensor:
    """(b,): sum_j w_ij s_ij / sum_j w_ij over all ranks' keys.

    Args:
        anchors, keys: (b, D).
        reference: (b, R), unit rows.
    """
    B = global_batch_size(anchors)
    reference = reference.to(anchors.dtype)
    moments, sums, total = (
        gram(keys, reference),
        B * column_mean(keys),
        B * column_mean(reference),
    )  # (D, R), (D,), (R,)
    with torch.autocast(anchors.device.type, enabled=False):
        weighted = ((anchors @ moments) * reference).sum(1) + anchors @ sums
        return weighted / (reference @ total + B)
