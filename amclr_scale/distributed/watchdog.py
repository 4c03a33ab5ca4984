"""Every rank watches the next one: a rank that died, or hangs, is named by the others, which end with it.

Each rank counts up a number in a store of its own (TCP, served by rank 0) and looks at its right-hand neighbour's. One
that has stood still for too long is announced to all in the same store. So the work per rank does not grow with the
number of ranks, and all have ended `limit` seconds and two beats later, whatever collective they were waiting in.
"""

import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from amclr_scale.distributed.launcher import RankInfo

LIMIT = 120.0  # seconds: longer than the longest pause of a healthy rank (a long call that holds Python's lock)
BEAT = 3.0
ACCUSED = "accused"
LEFT = b"left"


class Watchdog:
    """A background thread on each rank. With one rank it does nothing.

    Args:
        rank_info: this process among the others; the process group is up.
        limit: seconds without a sign of life after which a rank counts as dead.
        beat: seconds between two signs.
    """

    def __init__(self, rank_info: RankInfo, limit: float = LIMIT, beat: float = BEAT):
        self.rank, self.world_size, self.limit, self.beat = rank_info.rank, rank_info.world_size, limit, beat
        self._leaving = threading.Event()
        if self.world_size == 1:
            return
        host = os.environ["MASTER_ADDR"]
        patience = timedelta(seconds=max(30.0, limit))
        make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch documents it, and forgot to export it
        store = None
        if self.rank == 0:
            store = make_store(host, 0, is_master=True, wait_for_workers=False, timeout=patience)
        box = [store.port if store else None]
        dist.broadcast_object_list(box, src=0)
        self._store = store or make_store(host, box[0], is_master=False, timeout=patience)
        self._store.set(self._key(self.rank), "0")
        dist.barrier()  # everyone's number is there before anyone looks
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat {rank}"

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        beats, seen, seen_at = 0, b"0", time.monotonic()
        while not self._leaving.wait(self.beat):
            beats += 1
            try:
                self._store.set(self._key(self.rank), str(beats))
                if self._store.check([ACCUSED]):
                    self._end(self._store.get(ACCUSED).decode())
                now = self._store.get(self._key(neighbour))
            except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
                if self._leaving.is_set():
                    return
                self._end(f"rank 0 does not answer any more ({str(error).splitlines()[0]})")
            if now != seen or now == LEFT:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > self.limit:
                words = f"rank {neighbour} has given no sign of life for {self.limit:.0f} s: it died or hangs"
                self._say(words)
                self._store.set(ACCUSED, words)
                time.sleep(2 * self.beat)  # for the others to read it
                os._exit(1)

    def _say(self, words: str) -> None:
        print(f"\nrank {self.rank} ends: {words}; its own last lines say why", file=sys.stderr, flush=True)

    def _end(self, words: str) -> None:
        self._say(words)
        os._exit(1)

    def leave(self) -> None:
        """This rank is done, and is not to be missed. All ranks call it together, before the process group ends."""
        if self.world_size == 1:
            return
        self._leaving.set()
        self._thread.join()
        self._store.set(self._key(self.rank), LEFT.decode())
        dist.barrier()
