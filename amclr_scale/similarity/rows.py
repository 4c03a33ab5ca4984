"""Row blocks of a similarity matrix, never the whole of it: for whatever is not a log-sum.

b  rows on this rank    B  columns, over all ranks    c  rows in one block    D  embedding width

Similarities are float32 (float64 for float64 features), whatever precision the features or autocast have.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclr_scale.distributed.collectives import Negatives, check_even, gather, group
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import similarity_dtype
from amclr_scale.similarity.keys import FEATURES

RowFunction = Callable[..., tuple[Tensor, ...]]


def map_rows(
    fn: RowFunction, anchors: Tensor, keys: Tensor, *per_row: Tensor, negatives: Negatives = "all"
) -> tuple[Tensor, ...]:
    """Run `fn` over blocks of anchors @ (all ranks' keys).T and join its results row by row.

    `fn(block, positive_column, *per_row)` gets a block (c, B), the column of each row's positive (c,), and the same
    rows of `per_row`. It returns a tuple of tensors with c rows, and must be pure: backward runs it a second time, so
    that one block is alive at once, in forward and in backward. What it captures may require gradients.

    Args:
        fn: the row function.
        anchors: (b, D), the rows.
        keys: (b, D), this rank's part of the columns.
        per_row: tensors with b rows.
        negatives: whose keys are columns: "all" ranks', "local", or those of a group of so many consecutive ranks.

    Raises:
        ValueError: shapes that do not fit, or a row function that returns something else.
    """
    if anchors.ndim != 2 or keys.shape[1:] != anchors.shape[1:]:
        raise ValueError(
            f"keys: expected (b, D) like anchors, which are {tuple(anchors.shape)}, got {tuple(keys.shape)}"
        )
    for name, x in (("keys", keys), *((f"per_row[{i}]", x) for i, x in enumerate(per_row))):
        if len(x) != len(anchors):
            raise ValueError(f"{name}: expected {len(anchors)} rows, as many as anchors, got {len(x)}")
    ranks = group(negatives)
    check_even(len(keys), keys.shape[1], ranks)
    dtype = similarity_dtype(anchors, keys)
    with purpose(FEATURES):
        columns = gather(keys, ranks).to(dtype)  # (B, D)
    positives = torch.arange(len(anchors), device=anchors.device) + ranks.rank * len(anchors)  # (b,)
    device = anchors.device.type

    def block_of(rows: Tensor, columns: Tensor, positive: Tensor, *extra: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device, enabled=False):
            found = fn(rows.to(dtype) @ columns.T, positive, *extra)
        if not isinstance(found, tuple) or any(x.shape[:1] != rows.shape[:1] for x in found):
            got = [tuple(x.shape) for x in found] if isinstance(found, tuple) else type(found).__name__
            raise ValueError(f"fn: expected a tuple of tensors with {len(rows)} rows, as many as the block, got {got}")
        return found

    chunk = settings.current().chunk
    size = max(1, 2**21 // len(columns)) if chunk == "auto" else chunk
    results = [
        checkpoint(block_of, rows, columns, *rest, use_reentrant=False, preserve_rng_state=False)
        for rows, *rest in zip(*(torch.split(x, size) for x in (anchors, positives, *per_row)), strict=True)
    ]
    return tuple(torch.cat(parts) for parts in zip(*results, strict=True))
