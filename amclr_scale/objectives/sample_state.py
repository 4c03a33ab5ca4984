"""Numbers kept for every sample of the data set: estimators, temperatures, their moments.

b  samples on this rank    B = b W  samples of the global batch    N  samples of the data set    W  ranks

Two layouts give the same answers. Replicated: every rank holds all N rows and writes the same ones. Sharded: rank r
holds the rows of the ids that are r modulo W, so memory is N / W, and a look-up is one all-reduce of b W numbers per
column. `state_dict` holds all N rows in either layout; of a checkpoint each rank writes its own (table.py). Both fit
any number of ranks.

Where an id comes twice in a global batch, both look-ups give the old row, and the occurrence that is later in global
batch order (rank by rank) is the one that is kept. Rows change once their step has been applied (staging.py). A row
that would become infinite or nan stays as it was.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from amclr_scale.distributed import collectives
from amclr_scale.distributed.purpose import purpose
from amclr_scale.errors import UserError
from amclr_scale.objectives.base import Layout
from amclr_scale.objectives.staging import when_applied
from amclr_scale.objectives.table import Saving, Table, saving

REPLICATED_BYTES = 256 * 2**20  # "auto" shards a state that is larger than this

AT_ONCE = 2**22  # rows of all ranks that are gathered at once, to be saved

STATE = "per-sample state"  # the purpose of its messages


class SampleState(Table):
    """A table of N rows with named columns, held as buffers.

    Columns are float32, and become float64 the first time that float64 embeddings visit.
    """

    def __init__(
        self,
        num_samples: int,
        columns: Mapping[str, float],
        *,
        width: int = 0,
        layout: Layout = "auto",
        of_texts: bool = False,
    ) -> None:
        """Start every row with the initial values.

        Args:
            num_samples: N, the size of the data set; ids run from 0 to N - 1.
            columns: name -> initial value.
            width: 0 for one number per column, (N,); otherwise that many, (N, width).
            layout: see `objectives.create`.
            of_texts: the rows are texts, N is num_texts, and ids are text_ids: what errors call them.

        Raises:
            UserError: (a ValueError) num_samples is not positive.
        """
        super().__init__()
        self.of_texts = of_texts
        if num_samples < 1:
            size = "num_texts: expected the number of texts" if of_texts else "num_samples: expected the size"
            raise UserError(f"{size} of the data set, got {num_samples}")
        self.num_samples, self.columns = num_samples, dict(columns)
        self._transport: torch.device | None = None  # where tensors can cross ranks, if the table lies elsewhere
        if layout == "auto":
            total = num_samples * len(columns) * max(width, 1) * 4
            layout = "sharded" if total > REPLICATED_BYTES else "replicated"
        # the number of shards and which of them this is: (1, 0) is all of it
        sharded = layout == "sharded"
        self.shards = (collectives.world_size(), collectives.rank()) if sharded else (1, 0)
        rows = math.ceil(num_samples / self.shards[0])
        shape = (rows, width) if width else (rows,)
        for name, initial in columns.items():
            self.register_buffer(name, torch.full(shape, initial, dtype=torch.float32))

    def staged_bytes(self, width: int) -> int:
        return sum(column.nbytes // len(column) for column in self.buffers()) + 8  # its columns, and which row

    @purpose(STATE)
    def visit(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> "Visit":
        """Look at the rows of this step's samples. Every rank calls it, with equally many ids.

        Args:
            ids: (b,) int64, this rank's.
            dtype: of the numbers that will be written; float64 makes the table float64.

        Raises:
            UserError: (a ValueError) on every rank, where any rank has an id outside [0, N).
            ValueError: on every rank, where ranks have different numbers of ids.
        """
        num_shards, shard = self.shards
        if num_shards > 1 and self.shards != (collectives.world_size(), collectives.rank()):
            raise RuntimeError(
                f"sample state: made as shard {shard} of {num_shards}, used on rank {collectives.rank()} of "
                f"{collectives.world_size()}; create the objective after the process group"
            )
        collectives.check_even(len(ids), 1, collectives.group())
        self._transport = ids.device
        every = collectives.all_gather(ids)  # (B,)
        outside = (every < 0) | (every >= self.num_samples)
        if outside.any():
            ids_are, size_is, fix = (
                ("text_ids", "num_texts", "set num_texts to the number of texts")
                if self.of_texts
                else ("ids", "num_samples", "ids are positions in the data set")
            )
            raise UserError(
                f"{ids_are}: expected ids from 0 to {self.num_samples - 1} ({size_is} = {self.num_samples}), "
                f"got {every[outside][0].item()}; {fix}"
            )
        if dtype == torch.float64:
            self._widen()
        return Visit(self, ids, every)

    def _widen(self) -> None:
        for name, initial in self.columns.items():
            table: Tensor = getattr(self, name)
            if table.dtype != torch.float64:
                untouched = table == torch.tensor(initial, dtype=table.dtype)
                setattr(self, name, table.double().masked_fill(untouched, initial))

    @purpose(STATE)
    def column(self, name: str) -> Tensor:
        """All N rows of a column, (N,) or (N, width), on the CPU. Where sharded, every rank must call it."""
        found = self._gathered(name, keep=True)
        assert found is not None
        return found

    def _gathered(self, name: str, *, keep: bool) -> Tensor | None:
        """`column`, some rows of all ranks at a time; None for a rank that only takes part."""
        local: Tensor = getattr(self, name)
        num_shards, _ = self.shards
        if num_shards == 1:
            return local.detach().cpu()
        found = local.new_empty(len(local) * num_shards, *local.shape[1:], device="cpu") if keep else None
        step = max(1, AT_ONCE // num_shards)
        for first in range(0, len(local), step):
            part = local[first : first + step].to(self._transport or local.device)
            every = collectives.all_gather(part)
            if found is not None:
                by_shard = every.view(num_shards, *part.shape).transpose(0, 1)  # row k of shard r is id k W + r
                found[first * num_shards :][: len(every)] = by_shard.flatten(0, 1).cpu()
        return None if found is None else found[: self.num_samples]

    def held(self, name: str) -> Tensor:
        """The rows of a column that this rank holds and that belong to samples: all N, or its share."""
        num_shards, shard = self.shards
        column: Tensor = getattr(self, name)
        return column[: len(range(shard, self.num_samples, num_shards))]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if self.shards[0] == 1:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        if saving() is Saving.APART:
            return
        for name in self.columns:
            column = self._gathered(name, keep=saving() is Saving.EVERYWHERE or self.shards[1] == 0)
            if column is not None:
                destination[prefix + name] = column

    def shares(self) -> dict[str, Tensor]:
        return {name: self.held(name) for name in self.columns} if self.shards[0] > 1 else {}

    def _load_from_state_dict(self, state_dict: Mapping[str, Tensor], prefix: str, *rest: Any) -> None:
        _, strict, missing_keys, unexpected_keys, error_msgs = rest
        num_shards, shard = self.shards
        for name in self.columns:
            if prefix + name not in state_dict:
                missing_keys.append(prefix + name)
                continue
            saved = state_dict[prefix + name]
            ours: Tensor = getattr(self, name)
            expected = (self.num_samples, *ours.shape[1:])
            if saved.shape != expected:
                error_msgs.append(
                    f"{prefix}{name}: expected {expected} numbers (num_samples first), got {tuple(saved.shape)}; "
                    "the state was saved for another data set or other options"
                )
                continue
            loaded = torch.zeros_like(ours, dtype=torch.promote_types(ours.dtype, saved.dtype))
            mine = saved[shard::num_shards]
            loaded[: len(mine)] = mine.to(loaded)
            setattr(self, name, loaded)
        if strict:
            known = {prefix + name for name in self.columns}
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)


class Visit:
    """One step's look at a `SampleState`: read the rows of its samples, then perhaps write them."""

    def __init__(self, state: SampleState, ids: Tensor, every: Tensor) -> None:
        self._state, self._ids, self._every = state, ids, every

    @property
    def ids(self) -> Tensor:
        """(b,) int64, of the samples looked at."""
        return self._ids

    @purpose(STATE)
    def read(self) -> dict[str, Tensor]:
        """Column -> (b,) or (b, width), as they were before this step, on the device of the ids."""
        state, (num_shards, shard) = self._state, self._state.shards
        if num_shards == 1:
            return {name: _at(getattr(state, name), self._ids) for name in state.columns}
        mine = self._every % num_shards == shard
        rows = torch.where(mine, self._every // num_shards, 0)
        found = [_at(getattr(state, name), rows) for name in state.columns]
        joined = torch.stack(found)  # (columns, B) or (columns, B, width)
        masked = joined.masked_fill(~mine.view(1, -1, *[1] * (joined.ndim - 2)), 0.0)
        with torch.no_grad():
            summed = collectives.all_sum(masked)
        here = slice(collectives.rank() * len(self._ids), (collectives.rank() + 1) * len(self._ids))
        return dict(zip(state.columns, summed[:, here].unbind(), strict=True))

    @purpose(STATE)
    @torch.no_grad()
    def write(self, **columns: Tensor) -> None:
        """Set the named columns of this step's samples, (b,) or (b, width) each, on this rank and on the others.

        Inside of `staged` they are set when the step is committed. A sample of which any number is nan or inf keeps its
        row. Where one is -inf, the logarithm of what nothing has been seen of yet, the sample keeps all columns, but of
        columns with a width only at that index.
        """
        state, (num_shards, shard) = self._state, self._state.shards
        every = collectives.all_gather(
            torch.stack(list(columns.values()), dim=1)
        )  # (B, columns) or (B, columns, width)
        keep = _last_occurrences(self._every)
        numbers = every[keep]
        keep = keep[(numbers.isfinite() | numbers.isneginf()).flatten(1).all(1)]
        if num_shards > 1:
            keep = keep[self._every[keep] % num_shards == shard]
        rows, kept, names = self._every[keep] // num_shards, every[keep], tuple(columns)
        when_applied(lambda: _set_rows(state, rows, names, kept))


@torch.no_grad()
def _set_rows(state: SampleState, rows: Tensor, names: tuple[str, ...], kept: Tensor) -> None:
    there = kept.isfinite().all(1)  # (n,) or (n, width)
    for name, values in zip(names, kept.unbind(1), strict=True):
        table: Tensor = getattr(state, name)
        at = rows.to(table.device)
        table[at] = torch.where(there.to(table.device), values.to(table), table[at])


def _at(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table that may live on another device (a large state in host memory)."""
    return table[rows.to(table.device)].to(rows.device)


def _last_occurrences(ids: Tensor) -> Tensor:
    """Positions of the last occurrence of each distinct id."""
    order = ids.argsort(stable=True)
    ordered = ids[order]
    is_last = torch.ones_like(ordered, dtype=torch.bool)
    is_last[:-1] = ordered[1:] != ordered[:-1]
    return order[is_last]
