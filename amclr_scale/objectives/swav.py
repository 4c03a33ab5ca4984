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

Numerics: the first round is one of logarithms, as exp(s / eps) is e^20; from there on every row of e^(s / eps + f + g)
sums to 1 and every column to at least 1 / K, so that later rounds are products of that matrix with vectors, in float32.
The gradient of a prediction, softmax - q, is made in forward: one (b, K) of each side waits for backward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.objectives.base import at_least_float32, require
from amclr_scale.objectives.beside_clip import BesideCLIP, BesideOptions
from amclr_scale.similarity import all_gather
from amclr_scale.types import Embeddings, Loss

BLOCK_NUMBERS = 2**18  # of scores at a time: they stay in a cache


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
                _CrossEntropy.apply(s, code, config.swap_temperature)  # type: ignore[no-untyped-call]
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
    of_prototype = -all_gather(logits.logsumexp(0, keepdim=True)).logsumexp(0)  # (K,)
    codes = (logits + of_prototype).softmax(1)
    of_sample = torch.ones_like(codes[:, 0])
    for _ in range(iterations - 1):
        of_prototype = 1 / all_gather((of_sample @ codes)[None]).sum(0)
        of_sample = 1 / (codes @ of_prototype)
    return codes.mul_(of_prototype).mul_(of_sample[:, None]) if iterations > 1 else codes


class _CrossEntropy(torch.autograd.Function):
    """(scores (b, K), codes (b, K) that sum to 1, temperature) -> -sum_k code_k log softmax_k(score / t): (b,)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, codes: Tensor, temperature: float) -> Tensor:
        found = scores.new_empty(len(scores))
        gradient = torch.empty_like(scores) if ctx.needs_input_grad[0] else None
        size = max(1, BLOCK_NUMBERS // scores.shape[1])
        for start in range(0, len(scores), size):
            rows = slice(start, start + size)
            x = scores[rows] / temperature
            there, code = x.logsumexp(1, keepdim=True), codes[rows]
            found[rows] = there[:, 0] - torch.linalg.vecdot(code, x)
            if gradient is not None:
                gradient[rows] = x.sub_(there).exp_().sub_(code).div_(temperature)
        ctx.save_for_backward(gradient)
        return found

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[:, None], None, None
