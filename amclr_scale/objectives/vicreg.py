"""VICReg: pull pairs together without negatives, and keep the embedding's coordinates varied and uncorrelated.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022,
arXiv:2105.04906.

With X, Y (B, D) the image and text embeddings of all ranks, NOT of unit length:

    invariance   mean_ik (X_ik - Y_ik)^2
    variance     mean_k max(0, 1 - sqrt(var_k X + 1e-4)), averaged over X and Y         var divides by B - 1
    covariance   (1 / D) sum_{k != l} C_kl(X)^2 + the same of Y                         C = Xc^T Xc / (B - 1)
    value        25 invariance + 25 variance + covariance

Numerics: columns are centred before they are multiplied; sums are float32 over D x D matrices, never B x B.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, global_batch_size, numbers, require
from amclr_scale.similarity import column_mean, gram
from amclr_scale.types import Embeddings, Loss


class VICReg(Objective, name="vicreg"):
    """Variance, invariance and covariance: no negatives, no temperature; wants embeddings that are not normalised."""

    needs_unit_rows = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `vicreg`."""

        invariance: float = 25.0  # weight of the distance between the embeddings of a pair
        variance: float = 25.0  # weight of the hinge on each coordinate's standard deviation
        covariance: float = 1.0  # weight of the squared covariances between coordinates

        def __post_init__(self) -> None:
            for key in ("invariance", "variance", "covariance"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))

    config: Config

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return 0

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        B = global_batch_size(image)
        require(B > 1, "batch", "at least 2 samples, for a variance to exist", B)
        image_variance, image_covariance = _moments(image)
        text_variance, text_covariance = _moments(text)
        invariance = (image - text).square().mean()
        variance = (image_variance + text_variance) / 2
        covariance = image_covariance + text_covariance
        config = self.config
        loss = config.invariance * invariance + config.variance * variance + config.covariance * covariance
        return Loss(loss, numbers(objective=loss, invariance=invariance, variance=variance, covariance=covariance))


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """The variance and the covariance term of one modality, the same on all ranks."""
    centred = x - column_mean(x)
    covariance = gram(centred, centred) / (global_batch_size(x) - 1)  # (D, D)
    variances = covariance.diagonal()
    off_diagonal = covariance.square().sum() - variances.square().sum()
    return (1 - (variances + 1e-4).sqrt()).clamp(min=0).mean(), off_diagonal / x.shape[1]
