"""onlineCLR: one moving average for all negatives of the data set and one for all positives, instead of one per sample.

It is a baseline in the public code of Qiu et al., ICML 2023, arXiv:2305.11965, and has no paper of its own.

With temperature t, and 10 t for positives, over the pairs of all ranks:

    e = sum_{i != j} exp(s_ij / t),  p = sum_i exp(-s_ii / (10 t))
    u_n <- (1 - gamma) u_n + 2 gamma e,  u_p <- (1 - gamma) u_p + 2 gamma p                     both start from 0
    objective   t log u_n + 10 t log u_p
    value       t (2 e) / u_n + 10 t (2 p) / u_p                                                u held constant

The factor 2 is the two directions, which share every pair; the value is a sum over pairs, not a mean. Starting from 0,
the first step is 1 / gamma too large, as published.

Numerics: u_n and u_p are kept as float64 logarithms, so e^(1/t) is never formed.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from amclr_scale.objectives.base import FullPrecision, Objective, global_batch_size, numbers, require
from amclr_scale.objectives.estimator import ratio
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.objectives.staging import when_applied
from amclr_scale.similarity import all_gather, contrast
from amclr_scale.types import Embeddings, Loss


class OnlineCLR(FullPrecision, Objective, name="onlineclr"):
    """Global contrastive loss with a single moving average for negatives and one for positives."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"gamma": 1.0}
    log_u_negative: Tensor
    log_u_positive: Tensor

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `onlineclr`."""

        temperature: float = 0.01  # fixed; positives use ten times as much
        gamma: float = 0.5  # weight of the newest batch in both averages

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.temperature > 0, "temperature", "a positive number", self.temperature)
            require(0 < self.gamma <= 1, "gamma", "a weight in (0, 1]", self.gamma)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for name in ("log_u_negative", "log_u_positive"):
            self.register_buffer(name, torch.full((1,), -math.inf, dtype=torch.float64))

    def forward(self, embeddings: Embeddings) -> Loss:
        t, positive_t = self.config.temperature, 10 * self.config.temperature
        masks = self.masks(embeddings).of()
        side = contrast(embeddings.image, embeddings.text, temperature=t, exclude_positive=True, **masks).image
        log_e, log_p = side.log_sum, -side.positive / positive_t  # (b,) each

        log_u_n, log_u_p = self._average(self.log_u_negative, log_e), self._average(self.log_u_positive, log_p)
        if self.learns:
            when_applied(lambda: self._keep(log_u_n, log_u_p))

        negatives = t * ratio(math.log(2) + log_e, log_u_n.to(log_e.dtype))
        positives = positive_t * (math.log(2) + log_p - log_u_p.to(log_p.dtype)).exp()
        # the mean over ranks of these means times B is the sum over all pairs
        value = global_batch_size(embeddings.image) * (negatives + positives).mean()
        return Loss(value, numbers(objective=(t * log_u_n + positive_t * log_u_p)))

    def _keep(self, log_u_n: Tensor, log_u_p: Tensor) -> None:
        finite = log_u_n.isfinite() & log_u_p.isfinite()
        self.log_u_negative = torch.where(finite, log_u_n, self.log_u_negative)
        self.log_u_positive = torch.where(finite, log_u_p, self.log_u_positive)

    def _average(self, old: Tensor, log_terms: Tensor) -> Tensor:
        gamma = self.config.gamma
        new = all_gather(log_terms).double().logsumexp(0, keepdim=True) + math.log(2 * gamma)
        return new if gamma == 1 else torch.logaddexp(old + math.log1p(-gamma), new)
