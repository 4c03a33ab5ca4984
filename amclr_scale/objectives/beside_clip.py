"""What objectives without negatives of their own share: CLIP beside them, with a weight that may be 0.

value = clip CLIP + their own term
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


@dataclass(frozen=True, kw_only=True)
class BesideOptions(MaskOptions):
    """Options of CLIP's part."""

    temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
    clip: float = 1.0  # weight of CLIP's part; 0: no negatives at all

    def __post_init__(self) -> None:
        super().__post_init__()
        check_temperature(self.temperature)
        fix = "more than 0 with masks or a queue, which are CLIP's"
        require(bool(self.clip) or not self.masked, "clip", fix, self.clip)


class BesideCLIP(Objective):
    """An objective whose own term has no negatives."""

    config: BesideOptions

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 if options.clip else 0

    def with_clip(self, embeddings: Embeddings, weight: float, **own: Tensor) -> Loss:
        """`weight` times the one term that is given by name, and CLIP's part."""
        ((_, term),) = own.items()
        loss, found, config = weight * term, own, self.config
        if config.clip:
            t, masks = learned_temperature(embeddings, config.temperature), self.masks(embeddings).of()
            clip = softmax_loss(contrast(embeddings.image, embeddings.text, temperature=t, centred=True, **masks))
            loss, found = loss + config.clip * clip, {**found, "clip": clip}
        return Loss(loss, numbers(objective=loss, **found))
