"""What lives between steps: parameters, gradients, optimizer states, as DeepSpeed's stages allocate them per rank.

P  parameters    W  ranks
"""

from dataclasses import dataclass

from amclr_scale.config.schema import Config
from amclr_scale.memory.towers import PRECISIONS

MOMENTS = {"adamw": 2, "adamp": 2, "lamb": 2, "nadam": 2, "radam": 2, "lion": 1, "lars": 1, "sgd": 1}


@dataclass(frozen=True)
class State:
    """Bytes per rank."""

    parameters: int
    masters: int
    moments: int
    gradients: int  # as the backward leaves them, before they are reduced
    buffers: int


def state_of(config: Config, numels: list[int], buffers: int, world_size: int) -> State:
    """From the numbers of elements of the trained parameters.

    Args:
        buffers: bytes of the model's buffers.
    """
    total, stage = sum(numels), config.execution.zero_stage
    item = PRECISIONS[config.execution.precision].itemsize
    part = -(-total // world_size)
    return State(
        parameters=item * (part if stage == 3 else total),
        masters=4 * part if stage else 0,
        moments=4 * MOMENTS[config.optimizer.name] * (part if stage else total),
        gradients=item * total,
        buffers=buffers,
    )
