"""How embeddings lie on the sphere.

N  pairs over all ranks    D  width    x_i, y_i  unit image and text features

    alignment                mean_i |x_i - y_i|^2
    uniformity of X          log mean_{i != j} exp(-2 |x_i - x_j|^2)              of images, of texts; and across:
    cross-modal uniformity   log mean_{i != j} exp(-2 |x_i - y_j|^2)
        Wang & Isola, "Understanding Contrastive Representation Learning through Alignment and Uniformity on the
        Hypersphere", ICML 2020, arXiv:2005.10242
    modality gap             |mean x - mean y|
        Liang et al., "Mind the Gap", NeurIPS 2022, arXiv:2203.02053
    diversity                mean_{i != j} (1 - x_i . x_j), the mean pairwise cosine distance
    tolerance                mean of x_i . x_j over pairs i != j of the same class
        Wang & Liu, "Understanding the Behaviour of Contrastive Loss", CVPR 2021, arXiv:2012.09740
    effective rank           exp(entropy of the singular values of X, divided by their sum)
        Roy & Vetterli, "The Effective Rank", EUSIPCO 2007

Only uniformity looks at pairs; its exponentials are summed tile by tile, and everything else is a sum over samples or
a D x D product. Sums are float64.
"""

import numpy as np
import torch
from torch import Tensor

from amclr_scale.evaluation.shares import gather_rows, sum_over_ranks

ROWS = 1024
PERCENTILES = (5, 25, 50, 75, 95)


@torch.no_grad()
def geometry(image: Tensor, text: Tensor, labels: Tensor | None = None) -> dict[str, float]:
    """Every quantity above, of all ranks' pairs. All ranks call it together.

    Args:
        image: (n_r, D), unit length: this rank's.
        text: (n_r, D): the caption of each.
        labels: (n_r,) int64 classes, for tolerance; without them, or without two samples of one class, it is left out.

    Raises:
        ValueError: fewer than two pairs.
    """
    x, y = image.double(), text.double()
    N = int(sum_over_ranks(torch.tensor(len(x), device=x.device)))
    if N < 2:
        raise ValueError(f"image: expected at least two pairs over all ranks, got {N}")
    means = sum_over_ranks(torch.stack([x.sum(0), y.sum(0)])) / N
    found = {
        "alignment": float(sum_over_ranks((x - y).square().sum())) / N,
        "image_uniformity": _uniformity(x, x, N),
        "text_uniformity": _uniformity(y, y, N),
        "cross_uniformity": _uniformity(x, y, N),
        "modality_gap": float((means[0] - means[1]).norm()),
        "image_diversity": _diversity(x, N),
        "text_diversity": _diversity(y, N),
        "image_effective_rank": _effective_rank(x),
        "text_effective_rank": _effective_rank(y),
    }
    if labels is not None and (tolerance := _tolerance(x, labels)) is not None:
        found["image_tolerance"] = tolerance
    return found


def _uniformity(rows: Tensor, own_columns: Tensor, N: int) -> float:
    """Log of the mean over pairs of different samples; exp(-2 |a - b|^2) = exp(4 a.b - 4) for unit vectors."""
    columns = gather_rows(own_columns)
    total = rows.new_zeros(())
    for block in torch.split(rows, ROWS):
        for others in torch.split(columns, ROWS):
            total += (4 * (block @ others.T) - 4).exp().sum()
    total -= (4 * (rows * own_columns).sum(1) - 4).exp().sum()  # each sample with itself
    return float((sum_over_ranks(total) / (N * (N - 1))).log())


def _diversity(x: Tensor, N: int) -> float:
    squared = sum_over_ranks(x.square().sum())
    return 1 - float(sum_over_ranks(x.sum(0)).square().sum() - squared) / (N * (N - 1))


def _tolerance(x: Tensor, labels: Tensor) -> float | None:
    """Pairs of one class: |sum of its features|^2 minus the pairs of samples with themselves; None: no such pairs."""
    labels = labels.to(x.device)
    K = int(gather_rows(labels).max()) + 1
    sums = sum_over_ranks(x.new_zeros(K, x.shape[1]).index_add_(0, labels, x))
    squares = sum_over_ranks(x.new_zeros(K).index_add_(0, labels, x.square().sum(1)))
    counts = sum_over_ranks(x.new_zeros(K).index_add_(0, labels, torch.ones_like(x[:, 0])))
    pairs = float((counts * (counts - 1)).sum())
    return float((sums.square().sum(1) - squares).sum()) / pairs if pairs else None


def _effective_rank(x: Tensor) -> float:
    eigenvalues: Tensor = torch.linalg.eigvalsh(sum_over_ranks(x.T @ x)).clamp(min=0)
    share = eigenvalues.sqrt() / eigenvalues.sqrt().sum()
    return float(torch.special.entr(share).sum().exp())


def temperatures(values: Tensor) -> dict[str, float]:
    """Mean and percentiles of a data set's per-sample temperatures. Samples never seen (nan) do not count."""
    seen = values[values.isfinite()].double().cpu()
    if not len(seen):
        raise ValueError("values: expected at least one temperature, got none; no sample was seen yet")
    found = np.quantile(seen.numpy(), [percent / 100 for percent in PERCENTILES])  # torch's ends at 2^24 values
    return {"mean": float(seen.mean())} | {f"p{p:02d}": float(q) for p, q in zip(PERCENTILES, found, strict=True)}
