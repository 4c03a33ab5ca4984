"""What goes on beside training: a hook is told of every step, and may log, measure, save, or end the run.

A step goes by in this order: the step itself, `on_first_step` (once), every hook's `on_step`, every hook's
`after_step`. commands/job.py lists the hooks of a run; a new one is a class and a line there.
"""

from typing import Self

from torch import Tensor

from amclr_scale.engine.batch_plan import Position
from amclr_scale.engine.step import StepReport
from amclr_scale.types import Batch


class Hook:
    """Nothing, at every moment: override what is needed. It is entered (`with`) around the loop.

    All ranks have the same hooks in the same order, so a hook may talk to the other ranks at any of these moments.

    Attributes:
        name: of the file in a checkpoint that holds its state, NAME.safetensors; "" where there is none.
    """

    name = ""

    def on_first_step(self) -> None:
        """The first step that is run here (after a resume: not the run's first) is done."""

    def on_step(self, done: Position, batch: Batch, report: StepReport) -> None:
        """A step is done, and its embeddings and their gradients are still there. Keep no reference to them."""

    def after_step(self, done: Position) -> None:
        """Between two steps: what measures or saves the model comes here.

        Raises:
            StoppedError: to end the run.
        """

    def on_end(self) -> dict[str, float]:
        """The last step is done: numbers for the run's evaluation.json."""
        return {}

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to go on, the same on every rank."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state_dict` gave; {} where the checkpoint has none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass
