"""Work cut over ranks: consecutive shares that may differ by one, every item in exactly one of them."""

import torch
from torch import Tensor

from amclr_scale.distributed.collectives import all_gather, all_sum, rank, world_size


def share(n: int, of_rank: int | None = None) -> range:
    """A rank's items out of n (the calling rank's by default): r n // W ... (r + 1) n // W - 1."""
    r, W = rank() if of_rank is None else of_rank, world_size()
    return range(r * n // W, (r + 1) * n // W)


def largest_share(n: int) -> int:
    """The most items that any rank has: as many rounds everybody makes."""
    return -(-n // world_size())


def gather_rows(x: Tensor) -> Tensor:
    """(n_r, ...) of every rank -> (sum of n_r, ...), in rank order. Ranks may have different numbers, also none."""
    if world_size() == 1:
        return x
    counts = all_gather(torch.tensor([len(x)], device=x.device)).tolist()
    most = max(counts)
    if min(counts) == most:
        return all_gather(x)
    padded = x.new_zeros((most, *x.shape[1:]))
    padded[: len(x)] = x
    parts = torch.split(all_gather(padded), most)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum over ranks of equally shaped tensors."""
    return all_sum(x.detach())
