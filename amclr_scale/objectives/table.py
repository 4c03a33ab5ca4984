"""Rows of numbers that an objective keeps from step to step, as accounts and checkpoints see them.

A table that is cut over ranks is saved in one of three ways: whole by every rank (`state_dict()` by itself); whole by
rank 0 (`whole_on_first`); or by each rank its own rows (`rows_apart`, `own_rows`), so that nobody has to hold them all.
"""

import enum
from collections.abc import Iterator
from contextlib import _GeneratorContextManager, contextmanager
from contextvars import ContextVar

from torch import Tensor, nn

from amclr_scale.objectives.base import FullPrecision

ROWS = "rows/"  # in a rank's file of a checkpoint: row k of rank r of W is row k W + r of the table


class Saving(enum.Enum):
    """Who saves the rows of tables that are cut over ranks."""

    EVERYWHERE = enum.auto()
    FIRST = enum.auto()
    APART = enum.auto()


_saving: ContextVar[Saving] = ContextVar("who saves rows", default=Saving.EVERYWHERE)


@contextmanager
def _as(who: Saving) -> Iterator[None]:
    before = _saving.set(who)
    try:
        yield
    finally:
        _saving.reset(before)


def rows_apart() -> _GeneratorContextManager[None]:
    """Let `state_dict` leave out the rows of tables that are cut over ranks: `own_rows` are to be saved beside it."""
    return _as(Saving.APART)


def whole_on_first() -> _GeneratorContextManager[None]:
    """Let `state_dict` give the rows of tables that are cut over ranks to rank 0 alone. All ranks call it."""
    return _as(Saving.FIRST)


def saving() -> Saving:
    """Who saves them now."""
    return _saving.get()


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

    def shares(self) -> dict[str, Tensor]:
        """This rank's rows, by column, of a table that is cut over ranks; of any other nothing."""
        return {}

    def staged_bytes(self, width: int) -> int:
        """Bytes that one sample's new row, and its place, take up until its step is applied.

        Args:
            width: D.
        """
        raise NotImplementedError


def own_rows(objective: nn.Module) -> dict[str, Tensor]:
    """This rank's rows of tables that are cut over ranks, by their names in the objective's state."""
    found = dict[str, Tensor]()
    for prefix, module in objective.named_modules():
        if isinstance(module, Table):
            found |= {f"{prefix}.{name}" if prefix else name: rows for name, rows in module.shares().items()}
    return found


def tables_of(objective: nn.Module) -> Iterator[Table]:
    """The tables of an objective, those of its parts too."""
    return (module for module in objective.modules() if isinstance(module, Table))
