"""M3CoL: a mixture of two samples has both of their partners as positives, each as far as it was mixed in.

Kumar, Singhal et al., "Harnessing Shared Relations via Multimodal Mixup Contrastive Learning for Multimodal
Classification", TMLR 2025, arXiv:2409.17777; its contrastive part, without classifiers and fusion.

With a partner r(i) of every sample, a derangement of the global batch, and b_i of Beta(mix_beta, mix_beta) for a share
`mix_share` of the samples, 1 for the others,

    m_i   = norm( b_i z_i + (1 - b_i) z_r(i) ),     c_j = b_j + (1 - b_i) of the i with r(i) = j      texts not mixed
    A     = mean_i ( log sum_j exp(m_i.t_j / t) - b_i m_i.t_i / t - (1 - b_i) m_i.t_r(i) / t )
    A'    = mean_j ( c_j log sum_i exp(m_i.t_j / t) - b_j m_j.t_j / t - (1 - b_j) m_j.t_r(j) / t )    texts for anchors
    value = (1/4) ( A + A' + the same with texts mixed, by draws of their own, and images not )

and from the epoch `soft_epoch` on, with d = `soft_temperature` and targets that have no gradient,

    q_ij  = ( softmax_j(t_i.t_j / d) + softmax_j(z_i.z_j / d) ) / 2
    value = (1/2) mean_i ( log sum_j exp(s_ij / d) - sum_j q_ij s_ij / d  + the same with texts for anchors )

What is mixed are embeddings; in the authors' code, features behind the towers before they are made unit length. So any
two rows of the global batch can be mixed, and nothing is encoded twice. Draws follow from how far training is
(draws.py) and from a sample's place in the global batch, so they are the same on any number of ranks, and after a
resume.

Numerics: log-sums centred on m_i.t_i; float32.
"""

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.distill import softly, softmaxes_of
from amclr_scale.objectives.draws import Draws
from amclr_scale.similarity import contrast, gather, rank
from amclr_scale.types import Embeddings, Loss


class M3CoL(Objective, name="m3col"):
    """Mixed embeddings of one modality against both partners of the other, later soft targets."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `m3col`."""

        temperature: float | None = 0.1  # of mixtures: fixed; null: learned, 1 / logit_scale
        mix_beta: float = 0.15  # of the distribution of b
        mix_share: float = 0.5  # of the samples that are mixed
        mix_seed: int = 0  # of the draws
        soft_epoch: float | None = None  # from which soft targets replace mixtures; null: never
        soft_temperature: float = 0.125  # d

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(0.01 <= self.mix_beta <= 1000, "mix_beta", "a number from 0.01 to 1000", self.mix_beta)
            require(0 <= self.mix_share <= 1, "mix_share", "a share in [0, 1]", self.mix_share)
            enough = self.soft_epoch is None or self.soft_epoch >= 0
            require(enough, "soft_epoch", "an epoch, 0 or more, or null", self.soft_epoch)
            require(self.soft_temperature > 0, "soft_temperature", "a positive number", self.soft_temperature)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.draws = Draws()

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, config.temperature)
        if config.soft_epoch is not None and self.epoch >= config.soft_epoch:
            t = config.soft_temperature
            loss = self._soft(image, text)
        else:
            sides = ((image, text), (text, image))
            words = self.draws.words(config.mix_seed, self.epoch, learns=self.learns)
            terms = [self._mixed(f"{words} {which}", mixed, keys, t) for which, (mixed, keys) in enumerate(sides)]
            loss = (terms[0] + terms[1]) / 2
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _mixed(self, words: str, rows: Tensor, keys: Tensor, t: Tensor | float) -> Tensor:
        """(A + A') / 2, with these rows mixed."""
        config, b = self.config, len(rows)
        shares, partners = draws(words, global_batch_size(rows), config.mix_beta, config.mix_share)
        mine = slice(rank() * b, (rank() + 1) * b)
        everywhere = shares + torch.zeros_like(shares).index_add(0, partners, 1 - shares)  # c, (B,)
        share, partner, weight = (x[mine].to(rows.device) for x in (shares, partners, everywhere))
        share, weight = share.to(rows.dtype), weight.to(rows.dtype)
        mixed = F.normalize(share[:, None] * rows + (1 - share[:, None]) * gather(rows)[partner], dim=1)
        both = contrast(mixed, keys, temperature=t, centred=True)
        own, other = both.image.positive, (mixed * gather(keys)[partner]).sum(1)
        across = (1 - share) * (other - own) / t
        of_mixed = both.image.log_sum - across
        of_keys = weight * both.text.log_sum + (weight - 1) * own / t - across
        return (of_mixed + of_keys).mean() / 2

    def _soft(self, image: Tensor, text: Tensor) -> Tensor:
        d = self.config.soft_temperature
        both = contrast(image, text, temperature=d, centred=True)
        of_images, z = softmaxes_of(image.detach(), image.detach(), d)  # over rows, and over columns
        of_texts, y = softmaxes_of(text.detach(), text.detach(), d)

        def targets(own: Tensor, *mine: Tensor) -> Tensor:
            """q_ij + q_ji - 2 [i = j]: keys j are texts in the one direction, and images in the other."""
            return of_images(own, *mine[: len(z)]).add_(of_texts(own, *mine[len(z) :])).div_(2)

        missed = softly(image, text, targets, *z, *y)
        return ((both.image.log_sum + both.text.log_sum).mean() - missed / d) / 2


def draws(words: str, B: int, beta: float, share: float) -> tuple[Tensor, Tensor]:
    """Of a global batch b (B,), float64, and r (B,), int64 without a fixed point; the same in every process.

    Args:
        words: what they follow from.
        B: samples.
        beta: of both parameters of b's distribution.
        share: of the samples that are mixed.
    """
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words.encode()).digest()[:7], "big"))
    chosen = torch.rand(B, generator=generator) < share
    both = torch.full((B, 2), beta, dtype=torch.float64)
    # What torch.distributions.Beta draws with, which takes no generator of one's own.
    shares = torch._sample_dirichlet(both, generator)[:, 0].where(chosen, 1.0)
    circle = torch.randperm(B, generator=generator)  # everybody's partner is the next in it
    partners = torch.empty_like(circle)
    partners[circle] = circle.roll(-1)
    return shares, partners
