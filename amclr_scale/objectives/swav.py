"""SwALIP: images and texts predict one another's assignment to prototypes; no negatives.

Swapped assignment: Caron et al., "Unsupervised Learning of Visual Features by Contrasting Cluster Assignments" (SwAV),
NeurIPS 2020, arXiv:2006.09882. Between images and texts: Fini et al., "Improved Baselines for Vision-Language
Pre-training", TMLR 2023, arXiv:2305.08675.

With unit prototypes c_k, k = 1 ... K, s_ik = z_i.c_k, and codes q from `iterations` rounds of Sinkhorn's normalisation
over the samples of all ranks, without gradient:

    g_i = 0;  repeat f_k = -log sum_i exp(s_ik / eps + g_i),  g_i = -log sum_k exp(s_ik / eps + f_k)
    q_i   = softmax_k(s_ik / eps + f_k)
    swap  = -(1/2) mean_i ( sum_k q'_ik log softmax_k(s_ik / t) + sum_k q_ik log softmax_k(s'_ik / t) )
    value = clip CLIP + swap_weight swap

q' and s' are the texts'. Of a round, K numbers per rank travel.

Numerics: sums of exp(s / eps), e^20 each, are kept as logarithms; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.objectives.base import at_least_float32, require
from amclr_scale.objectives.beside_clip import BesideCLIP, BesideOptions
from amclr_scale.similarity import all_gather
from amclr_scale.types import Embeddings, Loss


class Prototypes(nn.Module):
    """K directions that all samples share."""

    def __init__(self, width: int, count: int):
        super().__init__()
        self.prototypes = nn.Parameter(F.normalize(torch.randn(count, width), dim=1))

    def forward(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        return {"shared": {"prototypes": self.prototypes}}


class SwAV(BesideCLIP, name="swav"):
    """Swapped prediction of cluster assignments between images and texts, beside CLIP or alone."""

    @dataclass(frozen=True, kw_only=True)
    class Config(BesideOptions):
        """Options of `swav`."""

        swap_weight: float = 0.2  # weight of the swapped prediction
        swap_temperature: float = 0.1  # of predictions
        prototypes: int = 3000  # K
        epsilon: float = 0.05  # of assignments: the smaller, the harder
        iterations: int = 3  # of Sinkhorn's normalisation
        freeze_epochs: float = 1.0  # during which prototypes do not learn

        def __post_init__(self) -> None:
            super().__post_init__()
            for key in ("clip", "swap_weight", "freeze_epochs"):
                require(getattr(self, key) >= 0, key, "a number of at least 0", getattr(self, key))
            for key in ("swap_temperature", "epsilon"):
                require(getattr(self, key) > 0, key, "a positive number", getattr(self, key))
            require(self.prototypes > 1, "prototypes", "at least 2", self.prototypes)
            require(self.iterations > 0, "iterations", "at least 1", self.iterations)

    config: Config

    @staticmethod
    def model_parts(options: Config, width: int) -> nn.Module:
        return Prototypes(width, options.prototypes)

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        prototypes = F.normalize(at_least_float32(embeddings.prototypes), dim=1)
        if self.epoch < config.freeze_epochs:
            prototypes = prototypes.detach()
        with torch.autocast(image.device.type, enabled=False):
            scores = [x @ prototypes.T for x in (image, text)]  # (b, K)
            codes = [assignments(s.detach() / config.epsilon, config.iterations) for s in scores]
            terms = [
                -(code * (s / config.swap_temperature).log_softmax(1)).sum(1)
                for code, s in zip(reversed(codes), scores, strict=True)
            ]
        swap = (terms[0] + terms[1]).mean() / 2
        return self.with_clip(embeddings, config.swap_weight, swap=swap)


def assignments(logits: Tensor, iterations: int) -> Tensor:
    """Codes (b, K) of this rank's samples, each a distribution over prototypes, balanced over all ranks' samples.

    Args:
        logits: (b, K), s / eps, without gradient.
        iterations: of the normalisation of prototypes and samples.
    """
    of_sample = logits.new_zeros(len(logits), 1)
    for _ in range(iterations):
        of_prototype = -all_gather((logits + of_sample).logsumexp(0, keepdim=True)).logsumexp(0)  # (K,)
        of_sample = -(logits + of_prototype).logsumexp(1, keepdim=True)
    return (logits + of_prototype).softmax(1)
