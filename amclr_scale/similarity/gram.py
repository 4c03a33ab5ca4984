"""Moments over the global batch: D x D products and D-vectors instead of B x B matrices.

With X, Y the rows of all ranks (B, D):

    gram(x, y)       = X^T Y            (D, D)
    column_mean(x)   = (1/B) sum_i X_i  (D,)

CyCLIP's cyclic terms and VICReg's covariances are functions of these. Sums are float32 (float64 for float64 rows).
"""

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Negatives, all_sum, group
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity.backends import similarity_dtype

MOMENTS = "moments"  # the purpose of its messages


def gram(x: Tensor, y: Tensor, *, negatives: Negatives = "all") -> Tensor:
    """X^T Y over the rows of all ranks, differentiable.

    Args:
        x: (b, D), this rank's rows.
        y: (b, E), this rank's rows.
        negatives: whose rows are summed, as in `contrast`.

    Returns:
        (D, E), the same on every rank.
    """
    if len(x) != len(y):
        raise ValueError(f"y: expected {len(x)} rows, as many as x, got {len(y)}")
    with torch.autocast(x.device.type, enabled=False), purpose(MOMENTS):
        dtype = similarity_dtype(x, y)
        return all_sum(x.to(dtype).T @ y.to(dtype), group(negatives))


def column_mean(x: Tensor, *, negatives: Negatives = "all") -> Tensor:
    """The mean row over all ranks, differentiable: (b, D) -> (D,)."""
    ranks = group(negatives)
    x = x.to(similarity_dtype(x))
    with purpose(MOMENTS):
        return all_sum(x.sum(0), ranks) / (len(x) * ranks.size)
