"""Debiased contrastive loss: negatives that are positives of the same class are subtracted in expectation.

Chuang et al., "Debiased Contrastive Learning", NeurIPS 2020, arXiv:2007.00224. Negatives weighted by their hardness:
Robinson et al., "Contrastive Learning with Hard Negative Samples", ICLR 2021, arXiv:2010.04592.

With n negatives j != i, a share p (`prior`) of which is taken to be of the anchor's class, h_ij = s_ij - s_ii:

    G_i   = mean_j exp(h_ij / t)                                  what negatives are, beside the positive's 1
    G_i   = mean_j exp((1 + beta) h_ij / t) / mean_j exp(beta h_ij / t)          with hardness beta
    v_i   = n max( (G_i - p) / (1 - p), exp(-(1 + s_ii) / t) )    the negatives among them; at least their least
    L_i   = log(1 + v_i)                                          value = (1/2) mean_i (L_i + L'_i)

Weights of hardness are differentiated, as published.

Numerics: log v is made from log G by log1p(-p / G), so nothing of size exp(1/t) is formed; float32.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.declarations import Equal
from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.masking import MaskOptions, where_keys
from amclr_scale.similarity import contrast
from amclr_scale.similarity.contrast import Side
from amclr_scale.types import Embeddings, Loss


class Debiased(Objective, name="debiased"):
    """Softmax loss whose negatives are corrected for those that are positives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `debiased`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        prior: float = 0.1  # share of negatives that are of the anchor's class, tau+
        hardness: float = 0.0  # beta: how much more a similar negative counts

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(0 <= self.prior < 1, "prior", "a share in [0, 1)", self.prior)
            require(self.hardness >= 0, "hardness", "a number of at least 0", self.hardness)

    config: Config

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        if options.prior or options.hardness:
            return None
        same = {key: getattr(options, key) for key in ("temperature", "mask_duplicates", "false_negative_margin")}
        return Equal("clip", same, "without a prior and hardness nothing is corrected")

    def forward(self, embeddings: Embeddings) -> Loss:
        config, beta = self.config, self.config.hardness
        t = learned_temperature(embeddings, config.temperature)
        rows = (embeddings.image, embeddings.text)
        options = {"exclude_positive": True, "centred": True, **self.masks(embeddings).of()}
        hard = contrast(*rows, temperature=t / (1 + beta), **options)
        sides = (hard.image, hard.text)
        if beta:
            weights = contrast(*rows, temperature=t / beta, **options)
            pairs = zip(sides, (weights.image, weights.text), strict=True)
            log_g = [torch.where(x.log_sum.isneginf(), 0.0, x.log_sum - y.log_sum) for x, y in pairs]
        else:
            log_g = [x.log_sum - x.log_num_keys for x in sides]
        terms = [self._loss(side, x, t) for side, x in zip(sides, log_g, strict=True)]
        loss = (terms[0] + terms[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _loss(self, side: Side, log_g: Tensor, t: Tensor | float) -> Tensor:
        log_n, p = side.log_num_keys, self.config.prior
        v = log_n + log_g
        if p:
            over = log_g > math.log(p)
            rest = torch.where(over, log_g, math.log(p) + 1)  # where nothing is left, any number: it is not used
            v = log_n + rest + torch.log1p(-(math.log(p) - rest).exp()) - math.log1p(-p)
            v = torch.where(over, v, -torch.inf)
            v = torch.maximum(v, log_n - (1 + side.positive) / t)
        return where_keys(side, torch.logaddexp(v, torch.zeros_like(v)))
