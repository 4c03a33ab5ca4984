"""MoCHi: the hardest negatives of an anchor are mixed with one another, and with the anchor, into harder ones.

Kalantidis et al., "Hard Negative Mixing for Contrastive Learning", NeurIPS 2020, arXiv:2010.01028; here between two
modalities, and from the keys of the batch where the paper has a queue.

Of the `hardest` keys n_1 ... n_N nearest to anchor z_i, its positive left out, are made, each with draws of its own,

    h_k  = norm( a n_p + (1 - a) n_q ),     a uniform in (0, 1)                            k = 1 ... mixed
    h'_k = norm( b z_i + (1 - b) n_p ),     b uniform in (0, 1/2)                          k = 1 ... mixed_with_anchor
    L_i  = log( sum_j exp(s_ij / t) + sum_k exp(z_i.h_k / t) + sum_k exp(z_i.h'_k / t) ) - s_ii / t
    value = (1/2) mean_i (L_i + L'_i)                                                      L' has texts for anchors

The choice and what is made have no gradient. Draws follow from how far training is and from an anchor's place in the
global batch, so they are those of one rank on any number of ranks, and after a resume.

Numerics: log-sums centred on the positive; made keys exist for a block of anchors at a time; float32.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.similarity import all_gather, contrast, rank, top_k
from amclr_scale.types import Embeddings, Loss

BLOCK_NUMBERS = 2**21  # of the keys that are made at a time


class MoCHi(Objective, name="mochi"):
    """CLIP with synthetic negatives, mixed from each anchor's hardest ones."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `mochi`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        hardest: int = 32  # N: how many keys are mixed; in smaller batches all negatives
        mixed: int = 16  # keys made of two of them
        mixed_with_anchor: int = 16  # keys made of one of them and the anchor
        mix_seed: int = 0  # of the draws

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(self.hardest >= 1, "hardest", "1 or more keys", self.hardest)
            require(self.mixed >= 0, "mixed", "0 or more keys", self.mixed)
            require(self.mixed_with_anchor >= 0, "mixed_with_anchor", "0 or more keys", self.mixed_with_anchor)

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        both = contrast(image, text, temperature=t, centred=True)
        terms: list[Tensor] = []
        for which, (side, anchors, keys) in enumerate(((both.image, image, text), (both.text, text, image))):
            term = side.log_sum
            if self.config.mixed + self.config.mixed_with_anchor and global_batch_size(anchors) > 1:
                term = torch.logaddexp(term, self._made(which, anchors, keys, side.positive, t))
            terms.append(term)
        loss = (terms[0] + terms[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _made(self, which: int, anchors: Tensor, keys: Tensor, positive: Tensor, t: Tensor | float) -> Tensor:
        """(b,): the log-sum over the keys that are made, centred on the positive."""
        config, b = self.config, len(anchors)
        N = min(config.hardest, global_batch_size(anchors) - 1)
        nearest = top_k(anchors.detach(), keys.detach(), N, exclude_self=True)[1]  # (b, N)
        everybody = all_gather(keys)
        two, one = draws(f"{config.mix_seed} {self.epoch!r} {which}", global_batch_size(anchors), config)
        mine = slice(rank() * b, (rank() + 1) * b)
        two, one = (x[mine].to(anchors.device, anchors.dtype) for x in (two, one))

        def block(z: Tensor, positive: Tensor, nearest: Tensor, two: Tensor, one: Tensor) -> Tensor:
            with torch.autocast(z.device.type, enabled=False), torch.no_grad():
                rows = torch.cat([nearest.gather(1, place(x, N)) for x in (two[..., 0], two[..., 1], one[..., 0])], 1)
                p, q, r = everybody[rows].split([two.shape[1], two.shape[1], one.shape[1]], dim=1)
                a, c = two[..., 2:], one[..., 1:] / 2
                made = torch.cat([a * p + (1 - a) * q, c * z[:, None] + (1 - c) * r], dim=1)
                made = F.normalize(made, dim=2)
            with torch.autocast(z.device.type, enabled=False):
                return (((made * z[:, None]).sum(2) - positive[:, None]) / t).logsumexp(1)

        size = max(1, BLOCK_NUMBERS // ((config.mixed + config.mixed_with_anchor) * anchors.shape[1]))
        parts = zip(*(x.split(size) for x in (anchors, positive, nearest, two, one)), strict=True)
        return torch.cat([checkpoint(block, *x, use_reentrant=False, preserve_rng_state=False) for x in parts])


def place(uniform: Tensor, N: int) -> Tensor:
    """Numbers of (0, 1) as places 0 ... N - 1."""
    return (uniform * N).long().clamp(max=N - 1)


def draws(seed: str, B: int, config: "MoCHi.Config") -> tuple[Tensor, Tensor]:
    """Uniform numbers of the global batch: (B, mixed, 3), two places and a share, and (B, mixed_with_anchor, 2)."""
    generator = torch.Generator().manual_seed(seed_of(seed))
    return (
        torch.rand(B, config.mixed, 3, generator=generator),
        torch.rand(B, config.mixed_with_anchor, 2, generator=generator),
    )


def seed_of(words: str) -> int:
    """A number of 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
