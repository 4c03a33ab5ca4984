"""Every rank watches the next one: a rank that died, or hangs, is named by the others, which end with it.

Each rank counts up a number in a store of its own (TCP, served by rank 0) and looks at its right-hand neighbour's. One
that has stood still for too long is announced to all in the same store. So the work per rank does not grow with the
number of ranks, and all have ended `limit` seconds, three beats and the time that others get to read later, whatever
collective they were waiting in.

A store that is gone without a word (rank 0 stopped, its node or the link to it lost) would be waited for for ever. So
each process has a timer beside it, which needs nobody: a beat that has not come back within the limit ends the process.
"""

import os
import platform
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import broadcast_object, gather_objects

LIMIT = 120.0  # seconds: longer than the longest pause of a healthy rank (a long call that holds Python's lock)
BEAT = 3.0
ACCUSED = "accused"
MISTAKE = 2  # the exit code of what words can mend


class Watchdog:
    """Background threads on each rank. With one rank it does nothing.

    Args:
        rank_info: this process among the others; the process group is up.
        limit: seconds without a sign of life after which a rank counts as dead.
        beat: seconds between two signs.
    """

    def __init__(self, rank_info: RankInfo, limit: float = LIMIT, beat: float = BEAT):
        self.rank, self.world_size = rank_info.rank, rank_info.world_size
        self.limit, self.beat = limit, min(beat, limit / 4)
        self.reading = max(1.5 * self.beat, 2.0)  # seconds in which all have looked, on a busy machine too
        self._leaving, self._returned = threading.Event(), time.monotonic()
        if self.world_size == 1:
            return
        self._hosts: list[str] = []
        self._address = os.environ["MASTER_ADDR"]
        threading.Thread(target=self._time_out, name="watch timer", daemon=True).start()
        patience = timedelta(seconds=max(30.0, limit))
        make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch documents it, and forgot to export it
        store = None
        if self.rank == 0:
            store = make_store(self._address, 0, is_master=True, wait_for_workers=False, timeout=patience)
        port = broadcast_object(store.port if store else None)
        self._store = store or make_store(self._address, port, is_master=False, timeout=patience)
        self._store.set(self._key(self.rank), "0")
        self._hosts = gather_objects(platform.node())  # everyone's number is there before anyone looks
        self._returned = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    @staticmethod
    def _key(rank: int) -> str:
        return f"beat {rank}"

    def _name(self, rank: int) -> str:
        return f"rank {rank} ({self._hosts[rank]})" if self._hosts else f"rank {rank}"

    def _time_out(self) -> None:
        """End this process when a beat has not come back: rank 0's store is asked in each of them."""
        while not self._leaving.wait(self.beat):
            if time.monotonic() - self._returned > self.limit:
                lost = "it or its node is stopped or gone, or the network between"
                self._end(f"{self._name(0)} at {self._address} has not answered for {self.limit:.0f} s: {lost}")

    def _run(self) -> None:
        neighbour = (self.rank + 1) % self.world_size
        beats, seen, seen_at = 0, b"0", time.monotonic()
        while not self._leaving.wait(self.beat):
            beats += 1
            try:
                self._store.set(self._key(self.rank), str(beats))
                if self._store.check([ACCUSED]):
                    code, _, words = self._store.get(ACCUSED).decode().partition(" ")
                    self._end(words, int(code), others_may_not_know=True)
                now = self._store.get(self._key(neighbour))
            except (RuntimeError, ValueError) as error:  # torch.distributed's errors are RuntimeErrors
                if self._leaving.is_set():
                    return
                self._end(f"{self._name(0)} does not answer any more ({str(error).splitlines()[0]})")
            self._returned = time.monotonic()
            if now != seen:
                seen, seen_at = now, time.monotonic()
            elif time.monotonic() - seen_at > self.limit:
                words = f"{self._name(neighbour)} has given no sign of life for {self.limit:.0f} s: it died or hangs"
                self._leaving.set()
                self._say(words)
                self._end_later(1)
                self._store.set(ACCUSED, f"1 {words}")
                time.sleep(self.reading)  # for the others to read it
                os._exit(1)

    def _say(self, words: str) -> None:
        print(f"\nrank {self.rank} ends: {words}; its own last lines say why", file=sys.stderr, flush=True)

    def _end(self, words: str, code: int = 1, *, others_may_not_know: bool = False) -> None:
        if not self._leaving.is_set():
            self._leaving.set()  # so that the timer is silent meanwhile
            self._say(words)
            if others_may_not_know:  # a collective that breaks would end them before they have read it
                time.sleep(self.reading)
            os._exit(code)

    def _end_later(self, code: int, words: str = "", seconds: float | None = None) -> threading.Timer:
        """End this process all the same where what it waits for next does not come."""

        def end() -> None:
            print(f"\n{words}" if words else "", file=sys.stderr, flush=True)
            os._exit(code)

        timer = threading.Timer(seconds or 2 * self.reading, end)
        timer.daemon = True
        timer.start()
        return timer

    def announce(self, mistake: str) -> None:
        """Have the other ranks end with code 2: this one has met a mistake, and they may be waiting for it.

        A rank that has met it too announces it in vain; it says so itself.
        """
        if self.world_size == 1:
            return
        self._leaving.set()
        self._thread.join(self.beat)
        timer = self._end_later(MISTAKE, mistake)
        try:
            first = not self._store.check([ACCUSED])
            if first:
                self._store.set(ACCUSED, f"{MISTAKE} {self._name(self.rank)}: {mistake}")
        except (RuntimeError, ValueError):
            return
        finally:
            timer.cancel()
        if first or self.rank == 0:  # the store goes with rank 0; and a collective that breaks would end the others
            time.sleep(2 * self.reading)

    def leave(self) -> None:
        """This rank is done, and is not to be missed. All ranks call it together, before the process group ends."""
        if self.world_size == 1:
            return
        dist.barrier()  # still watched: another rank may have results to write, and may be lost meanwhile
        self._leaving.set()
        lost = f"rank {self.rank} ends: some ranks have not left within {self.limit:.0f} s"
        timer = self._end_later(1, lost, self.limit)
        self._thread.join(self.limit)
        dist.barrier()  # the store goes with rank 0
        timer.cancel()
