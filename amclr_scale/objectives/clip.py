"""CLIP: the softmax contrastive loss of each pair against all other pairs of the batch, in both directions.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv:2103.00020.

With logits l_ij = s_ij / t over the keys j of all ranks (the positive j = i among them), and label smoothing e:

    L_i   = log sum_j exp(l_ij) - (1 - e) l_ii - e mean_j l_ij
    value = (1/2) mean_i (L_i + L'_i)                               L' has texts for anchors

Numerics: log-sum-exp in float32 over blocks of similarities; mean_j l_ij needs only the mean key.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.similarity import Contrast, column_mean, contrast
from amclr_scale.types import Embeddings, Loss

Negatives = Literal["all", "local"] | int


class CLIP(Objective, name="clip"):
    """Two-way softmax cross-entropy over the batch (InfoNCE, ITC): the large-batch reference."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `clip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        label_smoothing: float = 0.0  # share of the target spread evenly over all keys
        negatives: Literal["all", "local", "grouped"] = "all"  # whose samples are negatives: all ranks', this rank's
        group_size: int | None = None  # grouped: that many consecutive ranks share negatives

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(0 <= self.label_smoothing < 1, "label_smoothing", "a share in [0, 1)", self.label_smoothing)
            grouped = self.negatives == "grouped"
            require(
                grouped == (self.group_size is not None) and (self.group_size or 1) > 0,
                "group_size",
                "a number of ranks with negatives = 'grouped', and null otherwise",
                self.group_size,
            )

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.negatives: Negatives = "local" if config.negatives == "local" else config.group_size or "all"

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        both = contrast(embeddings.image, embeddings.text, temperature=t, negatives=self.negatives)
        image_target, text_target = both.image.positive, both.text.positive
        smoothing = self.config.label_smoothing
        if smoothing:
            image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
            mean_image = (image * column_mean(text, negatives=self.negatives)).sum(1)  # (b,), over all keys
            mean_text = (text * column_mean(image, negatives=self.negatives)).sum(1)
            image_target = (1 - smoothing) * image_target + smoothing * mean_image
            text_target = (1 - smoothing) * text_target + smoothing * mean_text
        image_loss = both.image.log_sum - image_target / t
        text_loss = both.text.log_sum - text_target / t
        loss = (image_loss + text_loss).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))


def softmax_loss(both: Contrast, temperature: Tensor | float) -> Tensor:
    """The value above without smoothing, from its statistics: a tensor (), this rank's mean."""
    image_loss = both.image.log_sum - both.image.positive / temperature
    text_loss = both.text.log_sum - both.text.positive / temperature
    return (image_loss + text_loss).mean() / 2


def check_temperature(temperature: float | None) -> None:
    """Raise unless the temperature is positive or None (learned)."""
    expected = "a positive number, or null for a learned one"
    require(temperature is None or temperature > 0, "temperature", expected, temperature)
