"""DCL: CLIP's loss with the positive taken out of the denominator; DCLW also weighs the positives.

Yeh et al., "Decoupled Contrastive Learning", ECCV 2022, arXiv:2110.06848.

With logits l_ij = s_ij / t over the keys of all ranks:

    DCL    L_i = log sum_{j != i} exp(l_ij) - l_ii            value = mean_i (L_i + L'_i)
    DCLW   L_i = log sum_{j != i} exp(l_ij) - w_i l_ii        w_i = 2 - exp(s_ii / sigma) / mean_k exp(s_kk / sigma)

The value is the sum over the two directions, so t times the gradient of DCL is that of SogCLR with gamma = 1: DCL is
the control that separates SogCLR's moving average from its missing positive.

Numerics: log-sum-exp in float32; w is a softmax over the global batch, shifted by its maximum, and differentiated.
"""

from dataclasses import dataclass

from torch import Tensor

from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.masking import Masking, MaskOptions, where_keys
from amclr_scale.similarity import all_gather, column_mean, contrast
from amclr_scale.types import Embeddings, Loss


class DCL(Objective, name="dcl"):
    """Decoupled contrastive loss: no positive in the denominator, no state."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `dcl`."""

        temperature: float | None = 0.07  # fixed; null: learned, 1 / logit_scale

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        return dcl_loss(embeddings, t, None, self.masks(embeddings))


class DCLW(Objective, name="dclw"):
    """Decoupled contrastive loss with positives weighted by a negative von Mises-Fisher density."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `dclw`."""

        temperature: float | None = 0.07  # fixed; null: learned, 1 / logit_scale
        sigma: float = 0.5  # width of the weight: the smaller, the less a near positive counts

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.sigma > 0, "sigma", "a positive number", self.sigma)

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        return dcl_loss(embeddings, t, self.config.sigma, self.masks(embeddings))


def dcl_loss(embeddings: Embeddings, temperature: Tensor | float, sigma: float | None, masking: Masking) -> Loss:
    """The values above: DCLW's with a sigma, DCL's without."""
    both = contrast(embeddings.image, embeddings.text, temperature=temperature, exclude_positive=True, **masking.of())
    terms: list[Tensor] = []
    weight: Tensor | float = 1.0
    for side in (both.image, both.text):
        if sigma is not None and not (terms and side.positive is both.image.positive):  # with gradients of its own
            weight = positive_weight(side.positive, sigma)
        terms.append(where_keys(side, side.log_sum - weight * side.positive / temperature))
    loss = (terms[0] + terms[1]).mean()
    return Loss(loss, numbers(objective=loss, temperature=temperature))


def positive_weight(positive: Tensor, sigma: float) -> Tensor:
    """The weight w of DCLW, (b,); its mean over the global batch is one."""
    largest = all_gather(positive).max()
    density = ((positive - largest) / sigma).exp()
    return 2 - density / column_mean(density[:, None])
