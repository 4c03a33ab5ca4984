"""Sums over the samples of all ranks that share a group: several positives per anchor, never a B x B matrix.

b  samples of this rank    B = b W  samples of all ranks    n_i  samples of i's group, itself among them    D  width

    same = SameGroup(labels)             # (b,) int64; a negative number is a group of its own
    same.counts                          # n_i
    same.sums(text)                      # (b, D), row i is the sum of the rows of i's group: B D numbers travel
    same.over(fn, image, text, log_sum)  # (b,), sum over p in i's group of fn(s_ip, log_sum_i)

The second costs O(B D). The third computes the sum_i n_i similarities one by one, in blocks that backward makes again.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from amclr_scale.distributed.collectives import Negatives, all_gather, gather, group
from amclr_scale.distributed.purpose import purpose
from amclr_scale.similarity.backends import similarity_dtype
from amclr_scale.similarity.keys import FEATURES
from amclr_scale.similarity.masks import counted_off

PAIR_NUMBERS = 2**21  # of a block of pairs: D each
ALONE = 2**62


class SameGroup:
    """Who shares a group with this rank's samples.

    Args:
        groups: (b,) int64; every rank has as many.
        negatives: among whose samples, as in `contrast`.

    Attributes:
        numbers: (b,) int64, the groups as `contrast` takes them: what was negative has a number of its own.
        counts: (b,) int64, n_i.
    """

    def __init__(self, groups: Tensor, *, negatives: Negatives = "all"):
        if groups.ndim != 1 or groups.dtype != torch.int64:
            raise ValueError(f"groups: expected (b,) torch.int64, got {tuple(groups.shape)} {groups.dtype}")
        self._ranks = group(negatives)
        b, first = len(groups), self._ranks.rank * len(groups)
        self._all = torch.arange(first, first + b, device=groups.device)
        self.numbers = torch.where(groups < 0, ALONE + self._all, groups)
        self._dense = counted_off(all_gather(self.numbers, self._ranks)).long()  # (B,)
        sizes = torch.zeros_like(self._dense).scatter_add_(0, self._dense, torch.ones_like(self._dense))
        mine = self._dense[self._all]  # (b,)
        self._mine, self.counts = mine, sizes[mine]
        self._starts = (sizes.cumsum(0) - sizes)[mine]  # of each group in the order by groups

    def sums(self, rows: Tensor) -> Tensor:
        """(b, D): the sum of all ranks' rows of each sample's group, differentiable; at least float32."""
        everybody = self._gathered(rows)
        by_group = torch.zeros_like(everybody).index_add(0, self._dense, everybody)  # as many rows as there may be
        return by_group[self._mine]

    def over(self, fn: Callable[..., Tensor], anchors: Tensor, keys: Tensor, *per_anchor: Tensor) -> Tensor:
        """(b,): the sum over the keys p of each anchor's group, its own among them, of `fn(s_ip, *per_anchor_i)`.

        Args:
            fn: element-wise and pure: numbers of pairs (P,), and of their anchors, -> (P,).
            anchors: (b, D).
            keys: (b, D), of this rank's samples.
            per_anchor: (b,) each.
        """
        anchors, everybody = anchors.to(similarity_dtype(anchors)), self._gathered(keys)
        ends = self.counts.cumsum(0)
        order = self._dense.sort(stable=True).indices  # (B,)

        def block(first: int, last: int, anchors: Tensor, everybody: Tensor, *per_anchor: Tensor) -> Tensor:
            pairs = torch.arange(first, last, device=anchors.device)
            i = torch.searchsorted(ends, pairs, right=True)
            j = order[self._starts[i] + pairs - (ends[i] - self.counts[i])]
            with torch.autocast(anchors.device.type, enabled=False):
                found = fn((anchors[i] * everybody[j]).sum(1), *(x[i] for x in per_anchor))
            return found.new_zeros(len(anchors)).index_add(0, i, found)

        size, count = max(1, PAIR_NUMBERS // anchors.shape[1]), int(ends[-1])
        total = anchors.new_zeros(len(anchors))
        for first in range(0, count, size):  # nothing of a block stays: there may be B^2 pairs
            part = (first, min(first + size, count), anchors, everybody, *per_anchor)
            total = total + checkpoint(block, *part, use_reentrant=False, preserve_rng_state=False)
        return total

    def _gathered(self, rows: Tensor) -> Tensor:
        with purpose(FEATURES):
            return gather(rows.to(similarity_dtype(rows)), self._ranks)
