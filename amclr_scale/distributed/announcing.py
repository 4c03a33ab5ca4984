"""A rank that still prepares says so to those that wait for it, and how far it is: in the store in which all will meet.

Rank 0 serves the store from here on, so that others reach it while it prepares itself. Where it starts late, they try
to reach it for as long as they prepare.
"""

import json
import platform
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.preparing import HERE, Work

BEAT = 2.0  # seconds between two looks at what others prepare, or this rank does
NAMED = 4  # of the ranks that prepare, in one line
_PREPARES = "prepares {}"


class Announcer:
    """Announces this rank's work from when it is made until `take`; with one rank it does nothing.

    Args:
        open_store: makes the store, or the connection to it, which may take as long as others are waited for.
    """

    def __init__(self, rank_info: RankInfo, open_store: Callable[[], Any], work: Work = HERE):
        self._rank_info, self._open, self._work = rank_info, open_store, work
        self._store: Any = None
        self._error: Exception | None = None
        self._enough, self._tried = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="preparing", daemon=True)
        if rank_info.world_size > 1:
            self._thread.start()

    def _run(self) -> None:
        try:
            self._store, before = self._opened(), ""
            self._tried.set()
            while not self._enough.is_set():
                words = self._work.words()
                if words != before:
                    said = {"host": platform.node(), "words": words}
                    self._store.set(_PREPARES.format(self._rank_info.rank), json.dumps(said))
                before = words
                self._enough.wait(BEAT)
        except Exception as error:  # told by `take`, from the thread that waits for it
            self._error = error
            self._tried.set()

    def _opened(self) -> Any:
        while True:
            ready = self._enough.is_set()  # an attempt that begins then is the last
            try:
                return self._open()
            except dist.DistNetworkError as error:
                if ready or "EADDRINUSE" in str(error):
                    raise
            self._enough.wait(BEAT)

    def check(self, seconds: float) -> None:
        """Raise what has kept the store from being opened, if that shows within so many seconds."""
        if self._thread.ident is not None and self._tried.wait(seconds) and self._error:
            raise self._error

    def take(self) -> Any:
        """The store: this rank is ready. Waits until it is open.

        Raises:
            DistNetworkError, DistStoreError: as whoever opens or uses one.
        """
        self._enough.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._error:
            raise self._error
        return self._store


@dataclass
class Progress:
    """What the ranks that have not come are seen to do.

    A rank may wait for another one of its node, which fetches or indexes for both: what one of a node does counts for
    all that prepare there.
    """

    began: float = field(default_factory=time.monotonic)
    said: dict[int, str] = field(default_factory=dict)
    hosts: dict[int, str] = field(default_factory=dict)
    moved: dict[str, float] = field(default_factory=dict)  # by host
    looked: float = 0.0

    def look(self, store: Any, ranks: list[int]) -> bool:
        """See how far they are; whether any has got on since the last time."""
        if time.monotonic() - self.looked < BEAT:
            return False
        self.looked, some = time.monotonic(), False
        for rank in [rank for rank in self.hosts if rank not in ranks]:  # it has come
            self.moved[self.hosts.pop(rank)] = self.looked
            self.said.pop(rank)
        for rank in ranks:
            key = _PREPARES.format(rank)
            if not store.check([key]):
                continue
            found = json.loads(store.get(key))
            if found["words"] != self.said.get(rank):
                self.said[rank], self.hosts[rank] = found["words"], found["host"]
                self.moved[found["host"]] = self.looked
                some = True
        return some

    def silent(self, ranks: list[int]) -> float:
        """Seconds since the one that has been silent for longest got on, or since the beginning."""
        if not ranks:
            return time.monotonic() - self.began
        return time.monotonic() - min(self.moved.get(self.hosts.get(rank, ""), self.began) for rank in ranks)

    def words(self, ranks: list[int]) -> str:
        """What they do."""
        found = [f"rank {rank} ({self.hosts[rank]}): {self.said[rank]}" for rank in ranks if self.said.get(rank)]
        return "; ".join(found[:NAMED])


@dataclass
class Waiting:
    """What a rank knows of those that it waits for.

    Attributes:
        absent: have not come.
        words: what some of them do.
        moved: when one of them was last seen to get on, or this rank began to wait.
    """

    absent: list[int] = field(default_factory=list)
    words: str = ""
    moved: float = field(default_factory=time.monotonic)
    beat: int = -1

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take what rank 0 says of the others."""
        self.absent[:], self.words = said["absent"], said["words"]
        if said["beat"] != self.beat:
            self.beat, self.moved = said["beat"], time.monotonic()
