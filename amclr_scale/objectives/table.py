"""Rows of numbers that an objective keeps from step to step, as the account of memory and the planner see them."""

from collections.abc import Iterator

from torch import nn

from amclr_scale.objectives.base import FullPrecision


class Table(FullPrecision):
    """A module whose buffers are such rows.

    Attributes:
        on_host: it stays in host memory wherever the objective goes.
    """

    on_host: bool = False

    @property
    def slots(self) -> int:
        """Rows that belong to no sample for good, as a bank's; 0 where every sample has one."""
        return 0

    def staged_bytes(self, width: int) -> int:
        """Bytes that one sample's new row, and its place, take up until its step is applied.

        Args:
            width: D.
        """
        raise NotImplementedError


def tables_of(objective: nn.Module) -> Iterator[Table]:
    """The tables of an objective, those of its parts too."""
    return (module for module in objective.modules() if isinstance(module, Table))
