"""SigLIP with several positives: every pair of one class, image or caption is a yes, all others are a no.

The sigmoid loss is that of Zhai et al., ICCV 2023, arXiv:2303.15343, which has one positive per row.

With y_ij = 1 if i and j share a group else -1, and r_ij = scale s_ij + bias:

    value = (1/B) sum_ij log(1 + exp(-y_ij r_ij)) = (1/B) [ sum_ij log(1 + exp(r_ij)) - sum_{same group} r_ij ]

so it is SigLIP's value less r of the further positives, and those are group sums: no pair is masked.

Numerics: log-sigmoid in float32; sums of features of a group stand for its pairs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from amclr_scale.declarations import read_by_positives
from amclr_scale.objectives.base import Objective, at_least_float32, numbers
from amclr_scale.objectives.siglip import scale_and_bias
from amclr_scale.objectives.supcon import positives_of
from amclr_scale.similarity import pairwise
from amclr_scale.types import Embeddings, Loss


class SigLIPPlus(Objective, name="siglip_plus"):
    """Sigmoid loss over all pairs, with several positives by class, image or caption."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `siglip_plus`. Its scale and bias are the model's."""

        positives: Literal["label", "image", "text"] = "image"  # of one class; of one image; with one caption

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return read_by_positives(options)

    def forward(self, embeddings: Embeddings) -> Loss:
        scale, bias = scale_and_bias(embeddings, self.name)
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        same = positives_of(embeddings, self.config.positives)
        further = (image * (same.sums(text) - text)).sum(1)  # (b,)
        loss = pairwise(image, text, scale, bias) - (scale * further + bias * (same.counts - 1)).mean()
        return Loss(loss, numbers(objective=loss, temperature=1 / scale, logit_bias=bias))
