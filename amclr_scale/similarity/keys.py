"""All ranks' rows of a tensor, as the blocks in which they arrive: gathered at once, or travelling round a ring.

b  rows of a rank    B  rows of all ranks    D  width

    keys = keys_of(text, ranks, "ring")
    for block in keys.blocks(gradient=True):      # rows block.first ... of the global batch
        ...                                       # adds to block.gradient
    keys.gradient                                 # (b, D) of this rank's rows, summed over ranks

In a ring the next block travels while this one is worked on, and the gradient of a block travels with it, one step
behind, until it has met every rank and comes home. A rank holds some blocks of (b, D), never (B, D).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import Arrival, Group, all_gather, pass_on, reduce_scatter
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity.settings import Gather

FEATURES = "features"  # the purpose of its messages


@dataclass(frozen=True)
class KeyBlock:
    """Some ranks' rows, and where to add their gradient."""

    first: int  # the global row of the first
    rows: Tensor  # (n, D)
    gradient: Tensor | None  # (n, D), or of the first columns only

    @property
    def columns(self) -> slice:
        """Which of the B columns these are."""
        return slice(self.first, self.first + len(self.rows))

    def diagonal(self, first_anchor: int) -> int | None:
        """The column of the positive of the anchor with this global row number, if any of this rank's are here."""
        column = first_anchor - self.first
        return column if 0 <= column < len(self.rows) else None


class GatheredKeys:
    """One block, of all rows."""

    def __init__(self, rows: Tensor, ranks: Group):
        self.rows, self.ranks = rows, ranks
        self.gradient: Tensor | None = None

    def blocks(self, gradient: torch.dtype | None = None, width: int | None = None) -> Iterator[KeyBlock]:
        """The block; with a `gradient` dtype, afterwards reduce what was added to its gradient.

        Args:
            gradient: its type.
            width: how many of the first columns have one; None: all.
        """
        total = None if gradient is None else torch.zeros_like(self.rows[:, :width], dtype=gradient)
        yield KeyBlock(0, self.rows, total)
        if total is not None:
            with purpose(FEATURES):
                self.gradient = reduce_scatter(total, self.ranks)


class RingKeys:
    """One block per rank, beginning with this rank's own."""

    def __init__(self, local: Tensor, ranks: Group):
        self.local, self.ranks = local.detach().contiguous(), ranks
        self.gradient: Tensor | None = None

    def blocks(self, gradient: torch.dtype | None = None, width: int | None = None) -> Iterator[KeyBlock]:
        """The blocks; with a `gradient` dtype, what was added to their gradients travels home; see `GatheredKeys`."""
        rows, total = self.local, None
        for step in range(self.ranks.size):
            owner = (self.ranks.rank + step) % self.ranks.size
            coming = self._send(rows) if step + 1 < self.ranks.size else None
            here = None if gradient is None else torch.zeros_like(rows[:, :width], dtype=gradient)
            yield KeyBlock(owner * len(rows), rows, here)
            if here is not None:
                if total is not None:
                    here += total.wait()
                total = self._send(here)
            if coming is not None:
                rows = coming.wait()
        self.gradient = None if total is None else total.wait()

    def _send(self, rows: Tensor) -> Arrival:
        with purpose(FEATURES):
            return pass_on(rows, self.ranks)


Keys = GatheredKeys | RingKeys


def keys_of(local: Tensor, ranks: Group, gather: Gather) -> Keys:
    """All ranks' rows, of which `local` (b, D) are ours."""
    if gather == "ring" and ranks.size > 1:
        return RingKeys(local, ranks)
    with purpose(FEATURES):
        return GatheredKeys(all_gather(local, ranks), ranks)


@dataclass(frozen=True)
class ExtraKeys:
    """Further keys, without gradient, that every anchor of one direction meets.

    Attributes:
        rows: (m, D): the same M on every rank, or, sharded, the share of them that this rank holds. They may lie on the
            host, from where they are fetched piece by piece.
        ids: (m,) int64, on the device of the anchors; None: no anchor leaves one out.
        anchor_ids: (b,) int64, of this rank's anchors, each of which leaves out the keys with its own id.
        sharded: the keys are those of all ranks together. Then the anchors travel: ranks exchange what they have summed
            for one another's, and their gradients.
        total: M, where the caller knows it; None: ranks are asked.
        same: (b,) int64, how many an anchor leaves out, where the caller knows it; None: they are counted.
        there: (m,) bool, which of the rows are keys at all; None: all. Then `same` is given.
    """

    rows: Tensor
    ids: Tensor | None = None
    anchor_ids: Tensor | None = None
    sharded: bool = False
    total: int | None = None
    same: Tensor | None = None
    there: Tensor | None = None

    def of(self, anchors: slice) -> "ExtraKeys":
        """The same keys for some of the anchors."""
        ids, same = self.anchor_ids, self.same
        return replace(
            self, anchor_ids=None if ids is None else ids[anchors], same=None if same is None else same[anchors]
        )
