"""Tables of an objective of which each rank has written its own rows, read by any number of ranks.

Row k of rank r of W is row k W + r of the table. A rank r' of W' that goes on wants rows k' W' + r': those of rank r
are among them only where r and r' are equal modulo gcd(W, W'). So of 1,024 files that were written, each of 64 ranks
reads 16, and of 64 each of 1,024 reads one.
"""

import math
from typing import Any

import torch
from torch import Tensor

from amclr_scale.checkpoint.pieces import PieceReader
from amclr_scale.objectives.table import ROWS


class StoredRows:
    """Such a table; `rows[r::W]` reads rank r's of W, and nothing else reads anything.

    Args:
        parts: of each rank that has written, its rows, unread.

    Raises:
        ValueError: they do not fit together.
    """

    def __init__(self, name: str, parts: list[Any]):
        shapes = [part.get_shape() for part in parts]
        if not all(shapes):
            raise ValueError(f"checkpoint: {name} has no rows")
        total, ranks = sum(shape[0] for shape in shapes), len(parts)
        if any(shape != [len(range(rank, total, ranks)), *shapes[0][1:]] for rank, shape in enumerate(shapes)):
            raise ValueError(f"checkpoint: the rows of {name} on {ranks} ranks make up no table")
        self._parts, self.shape = parts, torch.Size((total, *shapes[0][1:]))
        self.dtype: torch.dtype = parts[0][0:0].dtype

    def __getitem__(self, wanted: slice) -> Tensor:
        """Rows start, start + step, ..."""
        start, stop, step = wanted.indices(self.shape[0])
        assert stop == self.shape[0]
        ranks = len(self._parts)
        common = math.gcd(ranks, step)
        found = torch.empty(len(range(start, stop, step)), *self.shape[1:], dtype=self.dtype)
        for rank in range(start % common, ranks, common):
            # The first of this rank's rows that is wanted: k ranks + rank = start modulo step, and not before start.
            first = next(k for k in range(step // common) if (k * ranks + rank - start) % step == 0)
            while first * ranks + rank < start:
                first += step // common
            rows = self._parts[rank][:][first :: step // common]
            at = (first * ranks + rank - start) // step
            found[at :: ranks // common][: len(rows)] = rows
        return found


def stored_rows(reader: PieceReader) -> dict[str, Any]:
    """The tables of a checkpoint of which each rank has written its rows, for `load_state_dict`.

    Raises:
        ValueError, SafetensorError: ranks have written rows that do not fit together.
    """
    names = sorted(key.removeprefix(ROWS) for key in reader.keys[0] if key.startswith(ROWS))
    return {name: StoredRows(name, [file.get_slice(ROWS + name) for file in reader.files]) for name in names}
