"""VRNS: CLIP, and similarities of negative pairs that do not vary.

Lee et al., "On the Similarities of Embeddings in Contrastive Learning", ICML 2025, arXiv:2506.09781.

In batches of B, similarities of negative pairs vary more than in the data set of N, where at the optimum all of them
are -1 / (N - 1). The penalty holds them there:

    value = CLIP + weight mean_{i != j} (s_ij - delta)^2                     delta = -1 / (N - 1)

The mean is a function of two D x D matrices A = Z^T Z, C = T^T T and of the mean rows z, t of all ranks:

    sum_{i != j} (s_ij - delta)^2 = tr A C - sum_i s_ii^2 - 2 delta (B^2 z.t - sum_i s_ii) + delta^2 B (B - 1)

Numerics: float32; nothing of size B x B.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.cyclip import symmetric
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import all_sum, column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class VRNS(Objective, name="vrns"):
    """CLIP with a penalty on how much similarities of negative pairs vary, for small batches."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `vrns`."""

        num_samples: int  # N, images in the data set
        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        weight: float = 30.0  # of the penalty
        target: float | None = None  # delta, where similarities of negative pairs shall be; null: -1 / (N - 1)

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.weight >= 0, "weight", "a weight of at least 0", self.weight)
            within = self.target is None or -1 <= self.target < 1
            require(within, "target", "a similarity in [-1, 1), or null", self.target)

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
        clip = softmax_loss(contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks))
        delta = -1 / max(config.num_samples - 1, 1) if config.target is None else config.target
        spread = deviation(embeddings.image, embeddings.text, delta)
        loss = clip + config.weight * spread
        return Loss(loss, numbers(objective=loss, clip=clip, negative_spread=spread, temperature=t))


def deviation(image: Tensor, text: Tensor, delta: float) -> Tensor:
    """The mean over all ranks' pairs i != j of (s_ij - delta)^2: a tensor (), this rank's share of the mean.

    Args:
        image, text: (b, D).
        delta: see above.
    """
    B = global_batch_size(image)
    require(B > 1, "batch", "at least 2 samples, for a negative pair to exist", B)
    image, text = at_least_float32(image), at_least_float32(text)
    with torch.autocast(image.device.type, enabled=False):
        own = (image * text).sum(1)  # (b,)
        squares = sum_of_squares(image, text) / B - own.square().mean()
        sums = B * column_mean(image).dot(column_mean(text)) - own.mean()
    return (squares - 2 * delta * sums) / (B - 1) + delta**2


def sum_of_squares(image: Tensor, text: Tensor) -> Tensor:
    """The trace of A C, the sum over all ranks' i and j of s_ij^2: a tensor (), the same on every rank."""
    with torch.no_grad():
        a, c = symmetric(image), symmetric(text)  # (D, D)
        value, to_image, to_text = (a * c).sum(), image @ (2 * c), text @ (2 * a)
    # linear, with that gradient: autograd itself would spend two products on each symmetrical matrix
    linear = image.flatten().dot(to_image.flatten()) + text.flatten().dot(to_text.flatten())
    return value + all_sum(linear - linear.detach())
