"""Batches of samples that are alike: communities of a graph of neighbours, dealt whole.

"Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch Mining", 2025, arXiv:2505.11293: negatives that
a frozen model finds similar teach most, so samples that it finds similar should meet in a batch.

    amclr-scale shards communities DATA --image IMAGE.npy --text TEXT.npy --out NAME.npy

writes which community each sample is in (partition.py). In every epoch the communities are permuted and laid end to
end, and step n takes the samples n B .. (n + 1) B - 1 of that endless row: whole communities, but for those that a
batch's ends cut. Rank r of W serves the r-th of W equal shares of the batch. So the batch is the same for every number
of ranks, each sample comes once per epoch, and the only state is n, as in order.py.

Samples are read from all over the data set, so their shards have to be on this machine.
"""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from amclr_scale.config import schema
from amclr_scale.data.beside.references import fingerprint_of
from amclr_scale.data.formats.npy import map_npy
from amclr_scale.data.index import Index
from amclr_scale.data.order import BatchOrder, LastVisits, Visits
from amclr_scale.data.randomness import Purpose, permutation
from amclr_scale.errors import AbsentDataError, UserError

KEY = "data.communities"
MADE_BY = "amclr-scale shards communities writes them"
_LOOK_BACK = 65_536  # samples that `last_visits` looks at in one piece


class CommunityOrder(BatchOrder):
    """Which samples a rank serves at any step, at once.

    Args:
        communities: (N,) integers of at least 0, of every sample.
        seed: of the run.
    """

    def __init__(self, communities: NDArray[np.integer[Any]], *, seed: int):
        self.seed = seed
        self._members = np.argsort(communities, kind="stable")  # sample ids, community after community
        self._counts = np.unique(communities, return_counts=True)[1]  # (C,)
        self._first = np.cumsum(self._counts) - self._counts
        self._remember()

    def _remember(self) -> None:
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._remember()

    @property
    def samples_per_epoch(self) -> float:
        return float(len(self._members))

    def batch(self, step: int, global_batch_size: int, rank: int = 0, world_size: int = 1) -> Visits:
        share = global_batch_size // world_size
        start = step * global_batch_size + rank * share
        return self._visits(start, start + share)

    def last_visits(self, ids: NDArray[np.int64], step: int, global_batch_size: int) -> NDArray[np.int64]:
        last, stop = LastVisits(ids), step * global_batch_size
        while stop > 0 and last.missing:
            start = max(0, stop - _LOOK_BACK)
            last.note(self._visits(start, stop).ids, np.arange(start, stop) // global_batch_size)
            stop = start
        return last.found

    def _visits(self, start: int, stop: int) -> Visits:
        """Samples number start .. stop - 1 of the endless row."""
        N = len(self._members)
        none = np.zeros(0, np.int64)
        ids, passes = list[NDArray[np.int64]]([none]), list[NDArray[np.int64]]([none])
        while start < stop:
            epoch, offset = divmod(start, N)
            taken = min(stop - start, N - offset)
            dealt, ends = self._epoch(epoch)
            first, last = np.searchsorted(ends, [offset, offset + taken - 1], side="right").tolist()
            rows = [self._members[self._first[c] : self._first[c] + self._counts[c]] for c in dealt[first : last + 1]]
            begins = offset - (int(ends[first - 1]) if first else 0)
            ids.append(np.concatenate(rows)[begins : begins + taken])
            passes.append(np.full(taken, epoch))
            start += taken
        return Visits(np.concatenate(ids), np.concatenate(passes))

    def _make_epoch(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The communities in their order, and where in the epoch each ends."""
        dealt = permutation(len(self._counts), self.seed, Purpose.COMMUNITY_ORDER, epoch)
        return dealt, np.cumsum(self._counts[dealt])


def order_of_communities(data: schema.Data, index: Index, seed: int) -> tuple[CommunityOrder, str]:
    """The order that `data.batches: similar` asks for, and a digest of the communities.

    Raises:
        UserError: there is no such file, it is of other samples, or the shards are elsewhere.
    """
    if index.shards.remote.any():
        remote = index.shards[int(index.shards.remote.argmax())].url
        raise UserError(
            f"data.batches: similar reads samples from all over the data set, expected shards on this machine, got "
            f"{remote}; copy them, or use data.batches=random"
        )
    file = Path(data.communities or "").expanduser()
    communities = read_communities(file)
    N, of = index.num_samples, fingerprint_of(file)
    if len(communities) != N or (of is not None and of != index.fingerprint):
        got = f"{len(communities):,} of another data set (fingerprint {of})" if of else f"{len(communities):,}"
        raise UserError(
            f"{KEY}: {file}: expected the communities of the {N:,} samples in data.train, got {got}; {MADE_BY}"
        )
    return CommunityOrder(communities, seed=seed), hashlib.sha256(communities.astype("<i8").tobytes()).hexdigest()


def read_communities(file: Path) -> NDArray[np.integer[Any]]:
    """(N,) of a file.

    Raises:
        UserError: it is no such file.
    """
    try:
        found = map_npy(file)
    except (OSError, ValueError) as error:
        kind = AbsentDataError if isinstance(error, FileNotFoundError) else UserError
        raise kind(f"{KEY}: {file}: expected a .npy file of communities, got: {error}; {MADE_BY}") from error
    right = isinstance(found, np.memmap) and found.ndim == 1 and found.dtype.kind in "iu" and len(found)
    if not right or found.min() < 0:
        form = f"{getattr(found, 'dtype', type(found).__name__)} of shape {getattr(found, 'shape', '?')}"
        smallest = f" with {found.min()} among them" if right else ""
        raise UserError(f"{KEY}: {file}: expected integers of at least 0, one for each sample, got {form}{smallest}")
    communities: NDArray[np.integer[Any]] = np.array(found)
    return communities
