"""The k nearest keys of each query, over all ranks' keys."""

import torch
from torch import Tensor

from amclr_scale.similarity.collectives import all_gather, group


@torch.no_grad()
def top_k(queries: Tensor, keys: Tensor, k: int, *, exclude_self: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest similarities of each query (q, D) with all ranks' keys, and the keys' global row numbers."""
    ranks = group()
    similarities = queries @ all_gather(keys, ranks).T
    if exclude_self:
        own = torch.arange(len(queries)) + ranks.rank * len(keys)
        similarities.scatter_(1, own[:, None], -torch.inf)
    values, indices = similarities.topk(k)
    return values, indices
