"""Fetch the remote shards of each lane's next window while the present one is being read."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from amclr_scale.data.index import Index
from amclr_scale.data.order import Order
from amclr_scale.data.sources import is_remote
from amclr_scale.errors import UserError

_AT_ONCE = 4  # fetches under way per rank


def shards_at_once(lanes: int, window: int) -> int:
    """How many shards are held for so many lanes: each lane's window, and its next one."""
    return lanes * window * 2


class Prefetcher:
    """Keeps this rank's present and next windows in the cache.

    Args:
        lanes: those that the rank serves.
        per_step: samples that each lane serves at a step.
        ranks_here: ranks of this machine, which share its cache and its memory.

    Raises:
        UserError: there is no room even for these windows of all ranks here: shards would be fetched time and again.
    """

    def __init__(self, index: Index, order: Order, lanes: range, per_step: int, ranks_here: int = 1):
        self.index, self.order, self.lanes, self.per_step = index, order, lanes, per_step
        self._asked: set[int] = set()
        self._threads = ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fetch")
        at_once = shards_at_once(len(lanes), order.window)
        known = np.maximum(index.shards.file_sizes[index.shards.remote], 0)
        sizes = np.sort(known)[::-1][: at_once * ranks_here].tolist()  # the largest
        stream, bound = index.storage.stream, index.storage.cached_bytes
        together = sizes  # of different ranks: one that several read is there once
        if stream:  # every rank by itself
            index.storage.fetched_bytes = sum(sizes[:at_once])
            stream.check_room(index.storage.fetched_bytes * ranks_here)
        elif bound is not None and sum(together) > bound:
            whose = "a rank's lanes read" if ranks_here == 1 else f"the lanes of this machine's {ranks_here} ranks read"
            raise UserError(
                f"data.cache_gib: expected room for the {len(together)} shards that {whose} at once "
                f"({sum(together) / 2**30:.3g} GiB), got {bound / 2**30:.3g}; raise data.cache_gib, or lower "
                "data.shuffle_window"
            )
        else:
            far = np.flatnonzero(index.shards.remote)
            each = ((index.shards[n].url, size) for n, size in zip(far.tolist(), known.tolist(), strict=True))
            index.storage.check_room(each, int(known.sum()))
        index.open_shards = max(8, at_once)  # a removed shard's space is free once nobody has it open

    def advance(self, step: int) -> None:
        """Ask for what is needed soon; returns at once. A failure is told by whoever reads the shard."""
        position = step * self.per_step
        runs = [run for lane in self.lanes for run in self.order.shards_ahead(lane, position, 2)]
        wanted = {self.index.locate(first)[0] for run in runs for first in run}
        for number in sorted(wanted - self._asked):
            shard = self.index.shards[number]
            if is_remote(shard.url):
                self._threads.submit(self.index.storage.local_path, shard.url, shard.sha256)
        self._asked = wanted

    def close(self) -> None:
        """Drop what has not begun."""
        self._threads.shutdown(wait=False, cancel_futures=True)
