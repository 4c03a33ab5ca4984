"""The shards of data sets, as an index sees them: by number, and their numbers as arrays."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.indexes.entries import Shard
from amclr_scale.data.sources import is_remote


class Shards:
    """The shards of one data set, in order.

    Attributes:
        counts: (S,) int64, samples of each.
    """

    counts: NDArray[np.int64]

    def __init__(self, shards: Sequence[Shard]):
        self._shards = list(shards)
        self.counts = np.array([shard.num_samples for shard in self._shards], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: int) -> Shard:
        return self._shards[number]

    def __iter__(self) -> Iterator[Shard]:
        return (self[number] for number in range(len(self)))

    @cached_property
    def remote(self) -> NDArray[np.bool_]:
        """(S,), which of them are not on a file system."""
        return np.array([is_remote(shard.url) for shard in self._shards], dtype=bool)

    @cached_property
    def file_sizes(self) -> NDArray[np.int64]:
        """(S,), bytes; -1: unknown."""
        sizes = [-1 if shard.file_size is None else shard.file_size for shard in self._shards]
        return np.array(sizes, dtype=np.int64)

    def looked_at(self) -> list[Shard]:
        """Those whose kinds of members tell what all have."""
        return self._shards

    def damaged(self) -> Iterator[Shard]:
        """Those that were damaged when they were indexed."""
        return (shard for shard in self._shards if shard.damage)

    def pairs(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        """Number of samples and digest of shards start .. stop - 1."""
        return ((shard.num_samples, shard.digest) for shard in self._shards[start:stop])

    def fingerprint_of(self, start: int, stop: int) -> str:
        """Of these shards' content in order, as an index of these alone would have it. 32 hex digits."""
        return _hashed(json.dumps(pair) for pair in self.pairs(start, stop))[:32]

    def content(self) -> str:
        """Of all shards' content in any order. 12 hex digits."""
        return _hashed(sorted(json.dumps(pair) for pair in self.pairs(0, len(self))))[:12]


def _hashed(items: Iterable[str]) -> str:
    """sha256 of a JSON list, which is never in memory as a whole."""
    found, first = hashlib.sha256(b"["), True
    for item in items:
        found.update(item.encode() if first else b", " + item.encode())
        first = False
    found.update(b"]")
    return found.hexdigest()


class Joined(Shards):
    """Several data sets, one after another."""

    def __init__(self, parts: Sequence[Shards]):
        self._parts = list(parts)
        self._bounds: NDArray[np.int64] = np.cumsum([0, *map(len, self._parts)])
        self.counts = np.concatenate([part.counts for part in self._parts])

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, number: int) -> Shard:
        if not 0 <= number < len(self):
            raise IndexError(number)
        part = int(np.searchsorted(self._bounds, number, "right")) - 1
        return self._parts[part][number - int(self._bounds[part])]

    @cached_property
    def remote(self) -> NDArray[np.bool_]:
        return np.concatenate([part.remote for part in self._parts])

    @cached_property
    def file_sizes(self) -> NDArray[np.int64]:
        return np.concatenate([part.file_sizes for part in self._parts])

    def pairs(self, start: int, stop: int) -> Iterator[tuple[int, str]]:
        pieces = zip(self._parts, self._bounds.tolist(), strict=False)
        inside = ((part, max(0, start - first), min(len(part), stop - first)) for part, first in pieces)
        return chain.from_iterable(part.pairs(a, b) for part, a, b in inside if a < b)

    def fingerprint_of(self, start: int, stop: int) -> str:
        for part, first in zip(self._parts, self._bounds.tolist(), strict=False):
            if (start, stop) == (first, first + len(part)):
                return part.fingerprint_of(0, len(part))  # which it may know
        return super().fingerprint_of(start, stop)
