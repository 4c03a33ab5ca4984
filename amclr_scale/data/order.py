"""The order of samples: a pure function of (seed, position), the same for every number of ranks and workers.

B global batch    N data-set size    lanes independent streams    m = B / lanes

In epoch e the shards are permuted and laid end to end. What the epoch before left over (fewer samples than lanes) is
put in front, and the whole is cut into `lanes` equal parts; what is left over this time is carried on in turn. So
nothing is dropped or repeated, and all lanes enter an epoch at the same step: before epoch e every lane has served
exactly floor(e N / lanes) samples. Inside a lane the samples of `window` neighbouring shards are permuted among one
another: a window holds a few shards' ids, not their bytes.

Step n takes samples n m .. (n + 1) m - 1 of every lane, lane after lane; rank r of W serves lanes r lanes / W ..
(r + 1) lanes / W - 1. The global batch is then the same for every W that divides the lanes, and the only state is n.

A mixture passes over data set k `weight_k` times per epoch; its fractional passes go on where they stopped. Each pass
over a data set has a number, and (pass, id) names a visit: it occurs exactly once in a run of any length.
"""

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amclr_scale.data.randomness import Purpose, permutation
from amclr_scale.errors import UserError

_LOOK_BACK = 65_536  # samples that `last_visits` looks at in one piece


@dataclass(frozen=True)
class Visits:
    """Samples to serve, in order."""

    ids: NDArray[np.int64]  # (n,)
    passes: NDArray[np.int64]  # (n,), which pass over its data set each belongs to

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class _Pieces:
    """Runs of consecutive ids, laid end to end."""

    first: NDArray[np.int64]  # (P,), first id of each
    count: NDArray[np.int64]  # (P,)
    number: NDArray[np.int64]  # (P,), pass

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """(P,), the position behind each."""
        return np.cumsum(self.count)

    def cut(self, start: int, stop: int) -> "_Pieces":
        """The runs that make up positions start .. stop - 1."""
        overlap = slice(np.searchsorted(self.ends, start, "right"), np.searchsorted(self.ends, stop) + 1)
        ends, count = self.ends[overlap], self.count[overlap]
        begins = ends - count
        low, high = np.maximum(begins, start), np.minimum(ends, stop)
        kept = high > low
        return _Pieces((self.first[overlap] + low - begins)[kept], (high - low)[kept], self.number[overlap][kept])

    def take(self, order: NDArray[np.int64]) -> "_Pieces":
        return _Pieces(self.first[order], self.count[order], self.number[order])

    def visits(self) -> Visits:
        """Every position by itself."""
        within = np.arange(int(self.count.sum())) - np.repeat(np.cumsum(self.count) - self.count, self.count)
        return Visits(np.repeat(self.first, self.count) + within, np.repeat(self.number, self.count))


def _join(pieces: Sequence[_Pieces]) -> _Pieces:
    return _Pieces(*(np.concatenate([getattr(p, name) for p in pieces]) for name in ("first", "count", "number")))


class BatchOrder(ABC):
    """Which samples a batch has: a function of its number."""

    @property
    @abstractmethod
    def samples_per_epoch(self) -> float:
        """Mean length of an epoch."""

    @abstractmethod
    def batch(self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Visits:
        """What a rank serves at a step: B / W visits."""

    @abstractmethod
    def last_visits(self, ids: NDArray[np.int64], step: int, global_batch_size: int) -> NDArray[np.int64]:
        """In which step before `step` each of some samples was served last; -1: in none.

        Looks back until all are found, which is an epoch or so: as many numbers as it has samples are made, in pieces.

        Args:
            ids: (K,), each once.
            step: n.
            global_batch_size: B.
        """


class LastVisits:
    """`found` (K,): of some samples, each once, in which step they were served last; -1: in none that was noted."""

    def __init__(self, ids: NDArray[np.int64]):
        self._ids, self._known = ids, np.argsort(ids)
        self.found = np.full(len(ids), -1, dtype=np.int64)

    @property
    def missing(self) -> bool:
        return bool((self.found < 0).any())

    def note(self, served: NDArray[np.int64], steps: NDArray[np.int64]) -> None:
        """Samples (n,), and the steps (n,) that served them."""
        place = np.minimum(np.searchsorted(self._ids, served, sorter=self._known), len(self._ids) - 1)
        hit = self._ids[self._known[place]] == served
        np.maximum.at(self.found, self._known[place[hit]], steps[hit])


class Order(BatchOrder):
    """Which samples every lane serves, at any position, at once.

    Args:
        first_id: (S + 1,), the first id of every shard, and N.
        seed: of the run.
        lanes: streams that the data set is cut into.
        window: shards whose samples are mixed with one another inside a lane.
        parts: how many shards each data set has; default: one data set.
        weights: passes over each data set per epoch; default: 1 each.

    Raises:
        UserError: an epoch has fewer samples than lanes; the weights do not fit the data sets.
    """

    def __init__(
        self,
        first_id: NDArray[np.int64],
        *,
        seed: int,
        lanes: int,
        window: int,
        parts: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
    ):
        self.seed, self.lanes, self.window = seed, lanes, window
        shards = len(first_id) - 1
        bounds = np.concatenate([[0], np.cumsum(parts if parts else [shards])])  # (K + 1,) shards
        self._parts = [
            _Pieces(first_id[a:b].copy(), np.diff(first_id[a : b + 1]), np.zeros(b - a, dtype=np.int64))
            for a, b in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)
        ]
        self._sizes = [int(part.count.sum()) for part in self._parts]
        if weights is not None and len(weights) != len(self._sizes):
            raise UserError(
                f"data.weights: expected one number for each of the {len(self._sizes)} names in data.train, "
                f"got {len(weights)}"
            )
        # str: the decimal that was written in the configuration, exactly
        self._weights = [Fraction(str(weight)) for weight in weights] if weights else [Fraction(1)] * len(self._sizes)
        shortest = int(self.samples_per_epoch) - len(self._sizes) + 1  # fractional passes round by one sample each
        if shortest < lanes:
            raise UserError(
                f"data.lanes: expected at most as many lanes as an epoch has samples, got {lanes} lanes for "
                f"{shortest:,} samples; lower data.lanes or add samples"
            )
        self._remember()

    def _remember(self) -> None:
        self._epoch_pieces = lru_cache(maxsize=4)(self._make_epoch_pieces)
        self._windows = lru_cache(maxsize=2 * self.lanes)(self._make_windows)
        self._window_visits = lru_cache(maxsize=self.lanes + 1)(self._make_window_visits)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not hasattr(value, "cache_clear")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def samples_per_epoch(self) -> float:
        """N, but for a mixture."""
        return float(sum(w * n for w, n in zip(self._weights, self._sizes, strict=True)))

    def _begin(self, epoch: int) -> int:
        """Samples in all epochs before this one."""
        return sum(int(epoch * w * n) for w, n in zip(self._weights, self._sizes, strict=True))

    def lane_begin(self, epoch: int) -> int:
        """Samples that every lane has served before this epoch."""
        return self._begin(epoch) // self.lanes

    def epoch_at(self, position: int) -> int:
        """The epoch in which a lane's sample number `position` falls."""
        epoch = int(position * self.lanes / self.samples_per_epoch)
        while self.lane_begin(epoch) > position:
            epoch -= 1
        while self.lane_begin(epoch + 1) <= position:
            epoch += 1
        return epoch

    def visits(self, lane: int, start: int, stop: int) -> Visits:
        """Samples number start .. stop - 1 of a lane's endless stream."""
        ids, passes, at = list[NDArray[np.int64]](), list[NDArray[np.int64]](), start
        while at < stop:
            epoch = self.epoch_at(at)
            ends = self._windows(epoch, lane)[1]
            offset = at - self.lane_begin(epoch)
            number = bisect_right(ends, offset)
            begin = ends[number - 1] if number else 0
            found = self._window_visits(epoch, lane, number)
            taken = slice(offset - begin, min(stop - at + offset - begin, len(found)))
            ids.append(found.ids[taken])
            passes.append(found.passes[taken])
            at += len(ids[-1])
        none = np.zeros(0, dtype=np.int64)
        return Visits(np.concatenate([none, *ids]), np.concatenate([none, *passes]))

    def batch(self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Visits:
        """What a rank serves at a step: B / W visits (B must be divisible by the lanes, and the lanes by W)."""
        m, share = global_batch_size // self.lanes, self.lanes // world_size
        served = [self.visits(lane, step * m, (step + 1) * m) for lane in range(rank * share, (rank + 1) * share)]
        return Visits(np.concatenate([v.ids for v in served]), np.concatenate([v.passes for v in served]))

    def last_visits(self, ids: NDArray[np.int64], step: int, global_batch_size: int) -> NDArray[np.int64]:
        m, last = global_batch_size // self.lanes, LastVisits(ids)
        stop = step * m
        while stop > 0 and last.missing:
            start = max(0, stop - max(m, _LOOK_BACK // self.lanes))
            for lane in range(self.lanes):
                last.note(self.visits(lane, start, stop).ids, np.arange(start, stop) // m)
            stop = start
        return last.found

    def shards_ahead(self, lane: int, position: int, windows: int) -> list[tuple[int, ...]]:
        """First ids of the runs in the window at a lane's position and the next few: what a reader needs soon."""
        epoch = self.epoch_at(position)
        number = bisect_right(self._windows(epoch, lane)[1], position - self.lane_begin(epoch))
        found = list[tuple[int, ...]]()
        while len(found) < windows:
            pieces = self._windows(epoch, lane)[0]
            if number >= len(pieces):
                epoch, number = epoch + 1, 0
                continue
            found.append(tuple(pieces[number].first.tolist()))
            number += 1
        return found

    def _make_epoch_pieces(self, epoch: int) -> _Pieces:
        """The epoch's own samples in permuted shards, without what is carried in."""
        pieces = list[_Pieces]()
        for k, (part, weight, size) in enumerate(zip(self._parts, self._weights, self._sizes, strict=True)):
            at, stop = int(epoch * weight * size), int((epoch + 1) * weight * size)
            while at < stop:
                number = at // size
                order = permutation(len(part.first), self.seed, Purpose.SHARD_ORDER, k, number)
                end = min(stop, (number + 1) * size)
                found = part.take(order).cut(at - number * size, end - number * size)
                pieces.append(_Pieces(found.first, found.count, np.full_like(found.count, number)))
                at = end
        if len(pieces) == 1:
            return pieces[0]
        mixed = _join(pieces)
        return mixed.take(permutation(len(mixed.first), self.seed, Purpose.SHARD_ORDER, len(self._parts), epoch))

    def _make_windows(self, epoch: int, lane: int) -> tuple[list[_Pieces], list[int]]:
        """The windows of a lane in an epoch, and where in the lane each ends."""
        carried = self._begin(epoch) % self.lanes
        length = self.lane_begin(epoch + 1) - self.lane_begin(epoch)
        start, stop = lane * length - carried, (lane + 1) * length - carried  # in the epoch's own samples
        own = self._epoch_pieces(epoch).cut(max(0, start), max(0, stop))
        if start < 0:
            before = self._epoch_pieces(epoch - 1)
            total = int(before.ends[-1])
            own = _join([before.cut(total + start, total + min(0, stop)), own])
        windows = [
            own.take(np.arange(i, min(i + self.window, len(own.first)))) for i in range(0, len(own.first), self.window)
        ]
        return windows, np.cumsum([int(w.count.sum()) for w in windows]).tolist()

    def _make_window_visits(self, epoch: int, lane: int, number: int) -> Visits:
        ordered = self._windows(epoch, lane)[0][number].visits()
        shuffled = permutation(len(ordered), self.seed, Purpose.SAMPLE_ORDER, epoch, lane, number)
        return Visits(ordered.ids[shuffled], ordered.passes[shuffled])
