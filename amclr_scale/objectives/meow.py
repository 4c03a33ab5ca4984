"""MEOW: a key is the less of a negative the more clusterings find it in the anchor's own cluster.

Yu et al., "Heterogeneous Graph Contrastive Learning with Meta-path Contexts and Weighted Negative Samples", SDM 2023,
arXiv:2212.13847, for two views of a graph; here between two modalities.

Of R clusterings c_r of pairs, by the mean of a pair's two embeddings, with different numbers of clusters:

    w_ij  = (1/R) |{r : c_r(i) != c_r(j)}|                                                   0 ... 1, and 0 for j = i
    L_i   = log sum_j w_ij exp(s_ij / t) - s_ii / t
    value = mean_i (L_i + L'_i)                                                    L' has texts for anchors, as in DCL

sum_j w_ij exp(s_ij / t) is the mean over r of sums over the keys of other clusters, so no matrix of weights is made.
Clusters follow training (clusters.py); what they are of is less the batch's mean and of mean squared length 1, so that
no cluster is left behind where all embeddings move together, or apart, as at the start: else all would join the one
that lies ahead, and be nobody's negatives. Weights have no gradient. An anchor whose keys all have weight 0 counts 0.

Numerics: log-sums centred on the positive; their mean over r is a log-sum again; float32.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.clusters import Clusters
from amclr_scale.similarity import column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class MEOW(Objective, name="meow"):
    """DCL with negatives weighted by how many clusterings keep them apart from the anchor."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `meow`."""

        temperature: float | None = 0.07  # fixed; null: learned, 1 / logit_scale
        clusters: tuple[int, ...] = (100, 300)  # numbers of clusters of the R clusterings, each another
        gamma: float = 0.1  # weight of the newest batch in the means of clusters
        idle_steps: int = 100  # after so many steps without a member a cluster begins anew

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            different = len(set(self.clusters)) == len(self.clusters) > 0 and min(self.clusters) > 1
            require(different, "clusters", "one or more different numbers, each at least 2", list(self.clusters))
            require(0 < self.gamma <= 1, "gamma", "a weight in (0, 1]", self.gamma)
            require(self.idle_steps >= 0, "idle_steps", "a number of steps, 0 or more", self.idle_steps)

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.clusters = Clusters({str(C): C for C in config.clusters}, config.gamma, config.idle_steps)

    def allocate(self, width: int) -> None:
        super().allocate(width)
        self.clusters.make(width)

    def rehearse(self, width: int, slots: int) -> None:
        super().rehearse(width, slots)
        self.clusters.make(width)
        self.clusters.fill()

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        pairs = standard((image.detach() + text.detach()) / 2)
        joined = {str(C): self.clusters.join(str(C), pairs) for C in self.config.clusters}
        if self.learns:
            self.clusters.store({name: clusters for name, (_, clusters) in joined.items()})
        each = [
            contrast(
                image, text, temperature=t, exclude_positive=True, centred=True, image_groups=mine, text_groups=mine
            )
            for mine, _ in joined.values()
        ]
        terms = [mean_of([getattr(both, side).log_sum for both in each]) for side in ("image", "text")]
        loss = (terms[0] + terms[1]).mean()
        number = torch.stack([clusters.number for _, clusters in joined.values()]).mean()
        return Loss(loss, numbers(objective=loss, clusters=number, temperature=t))


def standard(rows: Tensor) -> Tensor:
    """(b, D) less the mean of all ranks' rows, of mean squared length 1: neither changes who is near to whom."""
    centred = rows - column_mean(rows)
    square = column_mean(centred.square().sum(1, keepdim=True))
    return centred / square.clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def mean_of(log_sums: list[Tensor]) -> Tensor:
    """(b,): the logarithm of the mean of what these are logarithms of; 0, without gradient, where all are -inf."""
    every = torch.stack(log_sums)
    some = ~every.isneginf().all(0)
    return torch.where(some, torch.where(some, every, 0.0).logsumexp(0) - math.log(len(every)), 0.0)
