"""The k nearest keys of each query, over the keys of all ranks: hard negatives, retrieval, nearest neighbours.

q  queries of this rank    n  keys of a rank (ranks may differ)    N  keys of all ranks    D  width

Each rank's keys visit the others in turn, and are compared tile by tile with the best so far: memory O(q k + n D).
Similarities are float32 (float64 for float64 features). Equal similarities are ordered by row number, so that the
answer depends neither on tiles nor on ranks.
"""

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import broadcast, gather_numbers, group
from amclr_scale.similarity import settings
from amclr_scale.similarity.backends import similarity_dtype
from amclr_scale.similarity.torch_backend import tile_shape


@torch.no_grad()
def top_k(queries: Tensor, keys: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest similarities of each query, and whose they are. Every rank has to call.

    Args:
        queries: (q, D), this rank's; ranks may have different numbers, also none.
        keys: (n, D), this rank's; ranks may have different numbers, also none.
        k: how many.
        exclude_self: leave out key i for query i of the same rank: queries and keys are rows of the same samples.

    Returns:
        values (q, k), largest first, and rows (q, k) int64: row numbers among the keys of all ranks, in rank order.

    Raises:
        ValueError: k is more than there are keys, or the shapes do not fit.
    """
    ranks = group()
    if queries.ndim != 2 or keys.ndim != 2 or queries.shape[1] != keys.shape[1]:
        raise ValueError(f"keys: expected (n, {queries.shape[-1]}), the width of queries, got {tuple(keys.shape)}")
    if exclude_self and len(queries) != len(keys):
        raise ValueError(f"exclude_self: expected as many queries as keys, got {len(queries)} and {len(keys)}")
    sizes = [size for (size,) in gather_numbers([len(keys)], ranks)]
    most = sum(sizes) - exclude_self
    if not 1 <= k <= most:
        raise ValueError(f"k: expected 1 to {most}, the number of keys to choose from, got {k}")

    dtype = similarity_dtype(queries, keys)
    values = torch.full((len(queries), k), -torch.inf, dtype=dtype, device=queries.device)
    rows = torch.full((len(queries), k), sum(sizes), device=queries.device)  # beyond the last: comes after all others
    r, c = tile_shape(settings.current(), queries.device)
    with torch.autocast(queries.device.type, enabled=False):
        for owner, size in enumerate(sizes):
            first = sum(sizes[:owner])
            theirs = broadcast(keys, owner, (size, keys.shape[1]), ranks)
            for start in range(0, len(queries), r):
                part = slice(start, start + r)
                left = queries[part].to(dtype)
                for column in range(0, size, c):
                    tile = left @ theirs[column : column + c].to(dtype).T  # (r, c)
                    if exclude_self and owner == ranks.rank:
                        tile.diagonal(start - column).fill_(-torch.inf)
                    tile_values, columns = _largest(tile, k)
                    values[part], rows[part] = _order(
                        torch.cat([values[part], tile_values], dim=1),
                        torch.cat([rows[part], columns + (first + column)], dim=1),
                        k,
                    )
    return values, rows


def _largest(tile: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """torch.topk, but of equal entries at its border those further left."""
    values, columns = tile.topk(min(k, tile.shape[1]), dim=1)
    crowded = (tile >= values[:, -1:]).sum(1) > values.shape[1]
    if bool(crowded.any()):
        ordered, places = tile[crowded].sort(dim=1, descending=True, stable=True)
        values[crowded], columns[crowded] = ordered[:, : values.shape[1]], places[:, : values.shape[1]]
    return values, columns


def _order(values: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest values, largest first, and of equal ones the lower row first."""
    rows, by_row = rows.sort(dim=1)
    values, by_value = values.gather(1, by_row).sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows.gather(1, by_value)[:, :k]
