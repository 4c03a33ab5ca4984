"""Nearest neighbours: a class by a vote of the most similar labelled samples.

Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, arXiv:1805.01978.

    score of class k = sum over the K_nn nearest training samples i of class k of exp(x . x_i / t)

x has unit length; customary are K_nn = 200 and t = 0.1. Votes are float64 and taken relative to the nearest sample,
so that no temperature is too small. A vote that ties is wrong (`places`). Of samples that are equally near, and more
than may vote, those vote that come first in the data.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from amclr_scale.evaluation.frozen_features.places import places
from amclr_scale.evaluation.shares import gather_rows, sum_over_ranks
from amclr_scale.similarity import top_k


def vote(similarities: Tensor, classes: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Scores (q, K) from similarities and classes (q, K_nn) of each query's neighbours, nearest first."""
    weights = ((similarities - similarities[:, :1]).double() / temperature).exp()
    scores = torch.zeros(len(similarities), num_classes, dtype=torch.float64, device=similarities.device)
    return scores.scatter_add_(1, classes, weights)


def nearest(queries: Tensor, keys: Tensor, key_classes: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Similarities and classes of the k nearest keys of all ranks, (q, k) each. All ranks call it together."""
    values, rows = top_k(queries, keys, k)
    return values, gather_rows(key_classes)[rows]


def sweep(
    x: Tensor, y: Tensor, validation: Tensor, num_classes: int, *, ks: Sequence[int], temperatures: Sequence[float]
) -> tuple[tuple[int, float], dict[tuple[int, float], float]]:
    """The (K_nn, t) that is best on the validation samples, with the others as keys; and every pair's accuracy.

    Of equal pairs the first in the order given wins. Numbers of neighbours that there are not are left out.

    Args:
        x: (n_r, D), unit length: this rank's training samples.
        validation: (n_r,) bool: samples to choose on.
    """
    available = int(sum_over_ranks((~validation).sum()))
    fitting = [k for k in ks if k <= available] or [available]
    similarities, classes = nearest(x[validation], x[~validation], y[~validation], max(fitting))
    count = int(sum_over_ranks(validation.sum()))
    scores: dict[tuple[int, float], float] = {}
    for k in fitting:
        for t in temperatures:
            votes = vote(similarities[:, :k], classes[:, :k], num_classes, t)
            right = (places(votes, y[validation]) == 1).sum()
            scores[k, t] = int(sum_over_ranks(right)) / count
    return max(scores, key=lambda pair: scores[pair]), scores
