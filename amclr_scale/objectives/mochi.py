"""MoCHi: the hardest negatives of an anchor are mixed with one another, and with the anchor, into harder ones.

Kalantidis et al., "Hard Negative Mixing for Contrastive Learning", NeurIPS 2020, arXiv:2010.01028; here between two
modalities, and from the keys of the batch where the paper has a queue.

Of the `hardest` keys n_1 ... n_N nearest to anchor z_i, its positive left out, are made, each with draws of its own,

    h_k  = norm( a n_p + (1 - a) n_q ),     a uniform in (0, 1)                            k = 1 ... mixed
    h'_k = norm( b z_i + (1 - b) n_p ),     b uniform in (0, 1/2)                          k = 1 ... mixed_with_anchor
    L_i  = log( sum_j exp(s_ij / t) + sum_k exp(z_i.h_k / t) + sum_k exp(z_i.h'_k / t) ) - s_ii / t
    value = (1/2) mean_i (L_i + L'_i)                                                      L' has texts for anchors

The choice and what is made have no gradient. Draws follow from how far training is (draws.py) and from an anchor's
place in the global batch, so they are those of one rank on any number of ranks, and after a resume.

What is made is never formed: its similarities, length and gradient follow from those of the N nearest and from the
similarities between these,

    z_i.h = ( a z_i.n_p + (1 - a) z_i.n_q ) / |a n_p + (1 - a) n_q|        |.|^2 from n_p.n_p, n_q.n_q and n_p.n_q

Numerics: log-sums centred on the positive; the nearest keys of a block of anchors at a time, once, for the gradient
with respect to z_i is made in forward; float32.
"""

import hashlib
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    beside,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.draws import Draws
from amclr_scale.similarity import all_gather, contrast, rank, top_k
from amclr_scale.types import Embeddings, Loss

BLOCK_NUMBERS = 2**19  # of the nearest keys at a time: they stay in a cache


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

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.draws = Draws()

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        both = contrast(image, text, temperature=t, centred=True)
        words = self.draws.words(self.config.mix_seed, self.epoch, learns=self.learns)
        terms: list[Tensor] = []
        for which, (side, anchors, keys) in enumerate(((both.image, image, text), (both.text, text, image))):
            term = side.log_sum
            if self.config.mixed + self.config.mixed_with_anchor and global_batch_size(anchors) > 1:
                term = torch.logaddexp(term, self._made(f"{words} {which}", anchors, keys, side.positive, t))
            terms.append(term)
        loss = (terms[0] + terms[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _made(self, words: str, anchors: Tensor, keys: Tensor, positive: Tensor, t: Tensor | float) -> Tensor:
        """(b,): the log-sum over the keys that are made, centred on the positive."""
        config, b = self.config, len(anchors)
        N = min(config.hardest, global_batch_size(anchors) - 1)
        nearest = top_k(anchors.detach(), keys.detach(), N, exclude_self=True)[1]  # (b, N)
        everybody = all_gather(keys.detach())
        two, one = draws(words, global_batch_size(anchors), config)
        mine = slice(rank() * b, (rank() + 1) * b)
        two, one = (x[mine].to(anchors.device, anchors.dtype) for x in (two, one))
        t = beside(t, anchors)
        with torch.autocast(anchors.device.type, enabled=False):
            found = _MadeLogSum.apply(anchors, positive, t, everybody, nearest, two, one)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)


class _MadeLogSum(torch.autograd.Function):
    """(anchors (b, D), positives (b,), temperature, all keys (B, D), the nearest (b, N), draws) -> log-sums (b,)."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, positive: Tensor, t: Tensor, everybody: Tensor, *drawn: Tensor) -> Tensor:
        found, d_found, d_t = torch.empty_like(positive), torch.empty_like(anchors), torch.empty_like(positive)
        N = drawn[0].shape[1]
        size = max(1, BLOCK_NUMBERS // (N * anchors.shape[1]))
        for start in range(0, len(anchors), size):
            rows = slice(start, start + size)
            z, (near, two, one) = anchors[rows], (x[rows] for x in drawn)
            keys = everybody[near]  # (r, N, D)
            s, between = (keys @ z[:, :, None])[:, :, 0], keys @ keys.mT  # (r, N) and (r, N, N)
            p, q, r = (place(x, N) for x in (two[..., 0], two[..., 1], one[..., 0]))
            a, c = two[..., 2], one[..., 1] / 2
            own, square = z.square().sum(1, keepdim=True), between.diagonal(dim1=1, dim2=2)
            crossed = between.flatten(1).gather(1, p * N + q)
            length = squared_length(a, square.gather(1, p), square.gather(1, q), crossed)
            length = torch.cat([length, squared_length(c, own, square.gather(1, r), s.gather(1, r))], 1).sqrt()
            shares = torch.cat([a, c, 1 - a, 1 - c], 1) / length.clamp(min=1e-12).repeat(1, 2)  # of first and second
            parts = torch.cat([s.gather(1, p), own.expand_as(c), s.gather(1, q), s.gather(1, r)], 1) * shares
            first, second = parts.chunk(2, dim=1)
            x = (first + second - positive[rows, None]) / t  # (r, mixed + mixed_with_anchor)
            found[rows] = x.logsumexp(1)
            weights = x.softmax(1)
            d_t[rows] = -(weights * x).sum(1) / t
            of_first, of_second = (shares * weights.repeat(1, 2) / t).chunk(2, dim=1)
            pairs, alone = of_first.split([a.shape[1], c.shape[1]], dim=1)
            on_keys = torch.zeros_like(s).scatter_add_(1, torch.cat([p, q, r], 1), torch.cat([pairs, of_second], 1))
            d_found[rows] = (on_keys[:, None] @ keys)[:, 0] + alone.sum(1, keepdim=True) * z
        ctx.save_for_backward(d_found, d_t, t)
        return found

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        d_found, d_t, t = ctx.saved_tensors
        of_t = (upstream * d_t).sum().reshape(t.shape)
        return upstream[:, None] * d_found, -upstream / t, of_t, *([None] * 4)


def squared_length(share: Tensor, first: Tensor, second: Tensor, crossed: Tensor) -> Tensor:
    """Of share v + (1 - share) w, from v.v, w.w and v.w."""
    rest = 1 - share
    return share.square() * first + rest.square() * second + 2 * share * rest * crossed


def place(uniform: Tensor, N: int) -> Tensor:
    """Numbers of (0, 1) as places 0 ... N - 1."""
    return (uniform * N).long().clamp(max=N - 1)


def draws(words: str, B: int, config: "MoCHi.Config") -> tuple[Tensor, Tensor]:
    """Uniform numbers of the global batch: (B, mixed, 3), two places and a share, and (B, mixed_with_anchor, 2)."""
    generator = torch.Generator().manual_seed(seed_of(words))
    return (
        torch.rand(B, config.mixed, 3, generator=generator),
        torch.rand(B, config.mixed_with_anchor, 2, generator=generator),
    )


def seed_of(words: str) -> int:
    """A number of 63 bits, the same in every process."""
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1
