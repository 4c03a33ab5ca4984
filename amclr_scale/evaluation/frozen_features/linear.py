"""Linear probe: what a linear classifier reads out of frozen features.

Alain & Bengio, "Understanding intermediate layers using linear classifier probes", 2016, arXiv:1610.01644; swept as
in Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.

n  labelled samples over all ranks    D  width    K  classes

    minimise  mean_i cross_entropy(W x_i + c, y_i) + l2 / 2 |W|^2        over W (K, D) and c (K,)

x has unit length, c is not shrunk. scikit-learn's LogisticRegression has C = 1 / (l2 n). The penalty is chosen on a
validation part of the training samples, and the classifier then learned from all of them. Every rank keeps its own
samples; loss and gradient are summed over ranks, and L-BFGS takes the same steps everywhere. Everything is float64:
the problem is strictly convex in W, so the answer depends neither on ranks nor on where it began.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.evaluation.frozen_features.places import places
from amclr_scale.evaluation.shares import sum_over_ranks

MAX_STEPS = 2000
SMALLEST_GRADIENT = 1e-6  # of the mean loss, largest entry


@dataclass(frozen=True)
class LinearClassifier:
    """Scores of K classes from features."""

    weight: Tensor  # (K, D) float64
    bias: Tensor  # (K,) float64
    l2: float

    def __call__(self, x: Tensor) -> Tensor:
        return x.double() @ self.weight.T + self.bias


def fit(
    x: Tensor, y: Tensor, num_classes: int, l2: float, *, start: LinearClassifier | None = None
) -> LinearClassifier:
    """Learn a classifier from all ranks' samples. All ranks call it together.

    Args:
        x: (n_r, D), this rank's features; ranks may have different numbers, also none.
        y: (n_r,) int64.
        start: where to begin; changes the time it takes, not the answer.
    """
    x, D = x.double(), x.shape[1]
    *total, n = sum_over_ranks(torch.cat([x.sum(0), x.new_tensor([float(len(x))])])).tolist()
    mean = x.new_tensor(total) / n
    x = x - mean  # the bias takes it up, so the solution is the same, and found in fewer steps
    flat = torch.zeros(num_classes * (D + 1), dtype=torch.float64, device=x.device)
    if start is not None:
        flat[:] = torch.cat([start.weight.flatten(), start.bias + start.weight @ mean])
    flat.requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=MAX_STEPS,
        max_eval=2 * MAX_STEPS,
        tolerance_grad=SMALLEST_GRADIENT,
        tolerance_change=0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        weight, bias = flat[: num_classes * D].view(num_classes, D), flat[num_classes * D :]
        own = F.cross_entropy(x @ weight.T + bias, y, reduction="sum") / n
        (gradient,) = torch.autograd.grad(own, flat)
        summed = sum_over_ranks(torch.cat([gradient, own.detach()[None]]))
        flat.grad = summed[:-1]
        with torch.no_grad():
            flat.grad[: num_classes * D] += l2 * flat[: num_classes * D]
            return summed[-1] + l2 / 2 * flat[: num_classes * D].square().sum()

    optimizer.step(closure)
    weight, bias = flat.detach()[: num_classes * D].view(num_classes, D), flat.detach()[num_classes * D :]
    return LinearClassifier(weight, bias - weight @ mean, l2)


def sweep(
    x: Tensor, y: Tensor, validation: Tensor, num_classes: int, l2: Sequence[float]
) -> tuple[LinearClassifier, dict[float, float]]:
    """The penalty that is best on the validation samples, learned again from all; and every penalty's accuracy.

    Penalties are tried from the largest down, each from the solution before it; of equal ones the largest wins.

    Args:
        validation: (n_r,) bool: samples to choose on.
    """
    scores: dict[float, float] = {}
    found: LinearClassifier | None = None
    best: LinearClassifier | None = None
    for penalty in sorted(l2, reverse=True):
        found = fit(x[~validation], y[~validation], num_classes, penalty, start=found)
        right = (places(found(x[validation]), y[validation]) == 1).double()
        hits, count = sum_over_ranks(torch.stack([right.sum(), right.new_tensor(float(len(right)))])).tolist()
        scores[penalty] = hits / count
        if best is None or scores[penalty] > scores[best.l2]:
            best = found
    assert best is not None
    return fit(x, y, num_classes, best.l2, start=best), scores
