"""An objective in a file of your own: each anchor's margin over its own mean negative, by a softplus.

amclr-scale train --config quickstart objective.name=mean_margin objective.module=examples/own_objective.py
"""

from dataclasses import dataclass

import torch.nn.functional as F

from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class MeanMargin(Objective, name="mean_margin"):
    """Softplus of the log-mean negative over the positive, both ways: DCL with an end to its pull."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `mean_margin`."""

        temperature: float | None = None  # fixed; null: learned
        margin: float = 0.2  # of the positive over the mean negative, in units of similarity

        def __post_init__(self) -> None:
            require(self.margin >= 0, "margin", "at least 0", self.margin)

    config: Config

    @staticmethod
    def negatives_of(options, B):
        return B - 1

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        both = contrast(embeddings.image, embeddings.text, temperature=t, exclude_positive=True)
        sides = [
            F.softplus((side.log_sum - side.log_num_keys) - (side.positive - self.config.margin) / t)
            for side in (both.image, both.text)
        ]
        loss = (sides[0] + sides[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))
