"""Decoupled softmax: each positive is compared with the negatives alone, so that positives do not compete.

Gupta et al., "Dual-Encoders for Extreme Multi-label Classification", ICLR 2024, arXiv:2310.10636 (DEXML).

With logits x_ip = s_ip / t, P_i the keys of the anchor's group (its own pair among them), N_i all others:

    L_i = (1/n_i) sum_{p in P_i} log(1 + exp(L^N_i - x_ip)),       L^N_i = log sum_{j in N_i} exp(x_ij)
    value = (1/2) mean_i (L_i + L'_i)

Numerics: one log-sum over the other groups, then the sum_i n_i similarities of positives one by one; log(1 + e^v) is
logaddexp(v, 0), centred on the pair; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_positives
from amclr_scale.objectives.base import Objective, learned_temperature, numbers
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.supcon import positives_of
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class Decoupled(Objective, name="decoupled"):
    """Softmax loss with several positives that do not compete with one another."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `decoupled`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        positives: Literal["label", "image", "text"] = "image"  # of one class; of one image; with one caption

        def __post_init__(self) -> None:
            check_temperature(self.temperature)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return read_by_positives(options)

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = embeddings.image, embeddings.text
        t = learned_temperature(embeddings, self.config.temperature)
        same = positives_of(embeddings, self.config.positives)
        both = contrast(
            image,
            text,
            temperature=t,
            exclude_positive=True,
            centred=True,
            image_groups=same.numbers,
            text_groups=same.numbers,
        )
        each = torch.as_tensor(t, dtype=both.image.log_sum.dtype, device=image.device).reshape(-1).expand(len(image))
        sides = [
            same.over(above_negatives, anchors, keys, side.log_sum, side.positive, each) / same.counts
            for side, anchors, keys in ((both.image, image, text), (both.text, text, image))
        ]
        loss = (sides[0] + sides[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, positives=same.counts.double().mean(), temperature=t))


def above_negatives(s: Tensor, log_sum: Tensor, pair: Tensor, t: Tensor) -> Tensor:
    """log(1 + exp(log-sum of negatives - x)) of positives with similarity s, whose log-sum is centred on their pair."""
    margin = log_sum - (s - pair) / t
    return torch.logaddexp(margin, torch.zeros_like(margin))
