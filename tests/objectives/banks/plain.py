"""A bank written down plainly: lists of rows, one process, float64."""

import torch
from torch import Tensor

from tests.objectives.harness import D


class PlainBank:
    """M slots of one modality; `state` gets what the bank's `state_dict` must hold."""

    def __init__(self, size: int, init: str = "empty", initial: Tensor | None = None):
        self.size, self.init = size, init
        self.rows = torch.zeros(size, D, dtype=torch.float64) if initial is None else initial.double()
        self.ids, self.written = [-1] * size, [0] * size
        self.pointer = self.steps = 0
        self.filled = size if init in ("randn", "rand", "zeros") else 0

    def first_look(self, rows: Tensor, ids: Tensor) -> None:
        """What the first batch does to a bank that begins with it, or whose width it tells."""
        if not self.steps and self.rows.shape[1] != rows.shape[1]:
            self.rows = rows.new_zeros(self.size, rows.shape[1])
        if self.init == "batch" and not self.steps:
            for slot in range(self.size):
                self.rows[slot], self.ids[slot] = rows[slot % len(rows)].detach(), int(ids[slot % len(rows)])
            self.filled = self.size

    def keys(self) -> Tensor:
        return self.rows[: self.filled].clone()

    def same(self, ids: Tensor) -> Tensor:
        """(B, filled) bool: which rows are the anchor's own."""
        return ids[:, None] == torch.tensor(self.ids[: self.filled], dtype=torch.int64)[None]

    def newest(self, sample: int) -> Tensor | None:
        """The row of a sample that came last."""
        start = self.pointer if self.filled == self.size else 0
        for back in range(1, self.filled + 1):
            slot = (start - back) % self.filled
            if self.ids[slot] == sample:
                return self.rows[slot].clone()
        return None

    def put(self, rows: Tensor, ids: Tensor) -> None:
        self.steps += 1
        for row, sample in zip(rows.detach(), ids.tolist(), strict=True):
            slot = self.pointer
            self.rows[slot], self.ids[slot], self.written[slot] = row, sample, self.steps
            self.pointer = (slot + 1) % self.size
            self.filled = min(self.size, self.filled + 1)
        if self.init == "batch" and self.steps == 1:
            self.written = [1] * self.size

    def into(self, state: dict[str, Tensor], prefix: str) -> None:
        numbers = {name: torch.tensor(getattr(self, name)).double() for name in ("pointer", "filled", "steps")}
        tables = {"ids": torch.tensor(self.ids).double(), "written": torch.tensor(self.written).double()}
        for name, value in {**numbers, **tables, "features": self.rows.clone()}.items():
            state[f"{prefix}.{name}"] = value


def banks_of(state, size: int, init: str, initial: dict[str, Tensor] | None = None) -> tuple[PlainBank, PlainBank]:
    """The two of a definition, kept as an attribute of its state, where `assert_same` does not look."""
    if not hasattr(state, "banks"):
        state.banks = [PlainBank(size, init, (initial or {}).get(side)) for side in ("image", "text")]
    return state.banks


def log_sum(batch: Tensor, bank: Tensor, left_out: Tensor, t) -> Tensor:
    """log sum over the batch (B, B) and the rows of a bank (B, m) that are not left out, of exp(s / t)."""
    return torch.cat([batch / t, (bank / t).masked_fill(left_out, -torch.inf)], 1).logsumexp(1)
