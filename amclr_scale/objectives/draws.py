"""What the random numbers of a step follow from: how far training is, and how many steps there have been since.

`Objective.epoch` is another number in each step of the trainer, but not in a loop of one's own that calls `set_epoch`
once per epoch, or never. There the steps at one value of it are counted: a step draws anew, whoever trains, and the
first one at a value draws as if nobody counted. Every rank counts alike, so all draw alike.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale.objectives.staging import when_applied


class Draws(nn.Module):
    """Which draws are a step's. A part of the objective's state, so a loop that is resumed goes on with new ones."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch, self.steps = 0.0, 0  # that have drawn at this epoch

    def words(self, seed: int, epoch: float, *, learns: bool) -> str:
        """What a generator of this step is seeded with.

        Args:
            seed: the option's.
            epoch: of the objective.
            learns: this step counts; inside of `staged`, once it is committed. One that does not learn, such as a
                measurement, draws as the last one that did.
        """
        steps = self.steps if epoch == self.epoch else 0

        def change() -> None:
            self.epoch, self.steps = epoch, steps + 1

        if learns:
            when_applied(change)
        else:
            steps = max(0, steps - 1)
        return f"{seed} {epoch!r}" + (f" {steps}" if steps else "")

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "epoch"] = torch.tensor(self.epoch, dtype=torch.float64)
        destination[prefix + "steps"] = torch.tensor(self.steps)

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        """A state from before steps were counted has none of them, and counts from 0."""
        self.epoch = float(state_dict.get(prefix + "epoch", 0.0))
        self.steps = int(state_dict.get(prefix + "steps", 0))
