"""The order, ids and exact resume of this toolkit as the first stage of anybody's webdataset pipeline.

    source = IndexedShards("shards/{000..099}.tar", global_batch_size=1024, per_item=128)
    pipeline = wds.DataPipeline(source, wds.decode("pil"), wds.to_tuple("jpg", "txt", "__id__"), wds.batched(128))
    loader = wds.WebLoader(pipeline, batch_size=None, num_workers=4)
    for images, texts, ids in source.follow(loader):
        ...
        state = source.state_dict()  # beside the model's: one number says where all ranks are

Every rank reads what `TrainLoader` would give it: the global batch number n holds the same samples for any number of
ranks that divides the lanes, and for any number of workers, and comes again after a resume, on other ranks too.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError
from torch.utils.data import IterableDataset, get_worker_info

from amclr_scale.config import schema
from amclr_scale.data.decoding import BadSampleError, check_whole
from amclr_scale.data.indexing import open_index
from amclr_scale.data.order import Order
from amclr_scale.data.randomness import Draws, Purpose
from amclr_scale.data.sources import Given
from amclr_scale.distributed import collectives
from amclr_scale.distributed.launcher import read_rank_info
from amclr_scale.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

_ATTEMPTS = 1000  # replacements tried for one sample
_LOGGED = 20  # faults of a process; all are counted


class IndexedShards(IterableDataset[dict[str, Any]]):
    """Sample dictionaries of one rank, endless, as webdataset's own stages expect them.

    Each holds the bytes of its members by extension (`jpg`, `txt`, ...), `__key__`, `__url__`, and beside these
    `__id__` (int, 0 .. N - 1: the row of what is kept per sample) and `__pass__` (int, passes over the data so far).

    The stages behind it must give one item for every `per_item` samples: `batched(per_item)`, or nothing that batches
    and 1. One that drops samples (a `select`, a handler that goes on) shifts them between items, and one that mixes
    them (`shuffle`) is not needed: the order is mixed already, over `shuffle_window` shards. Shards on a store are
    fetched when they are first read; `TrainLoader` fetches ahead.

    Args:
        shards: as in `data.train`: a folder, an index, paths with braces, urls; or a list of them.
        global_batch_size: samples of all ranks in a step: a multiple of the lanes.
        per_item: samples in one item that the pipeline gives out; divides a rank's share of the batch.
        seed: of the order.
        lanes: streams that the data is cut into, a multiple of every number of ranks that a run may have.
        shuffle_window: shards whose samples are mixed with one another inside a lane.
        weights: passes over each of several data sets per epoch.
        rank, world_size: default: of torch.distributed where it has started, else of the launcher's variables.
        cache: folder for indexes that are made, shards that are fetched, and unpacked ones (`data.cache`).
        cache_gib: bound on it.

    Attributes:
        num_samples: N.
        samples_per_epoch: of all ranks; N, but for a mixture with weights.
        fingerprint: of the shards' content.
        samples: how many all ranks together have been given.
        counts: samples that could not be read, by kind, as far as this process met them. Each is replaced by another
            one, which the seed chooses.

    Raises:
        UserError: from the constructor and from iteration, when the shards are not usable, or the numbers do not fit.
    """

    def __init__(
        self,
        shards: Given,
        *,
        global_batch_size: int,
        per_item: int = 1,
        seed: int = 0,
        lanes: int = 8,
        shuffle_window: int = 16,
        weights: Sequence[float] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        cache: str | None = None,
        cache_gib: float = 50.0,
        allow_pipe: bool = False,
    ):
        super().__init__()
        if (rank is None) != (world_size is None):
            raise UserError("rank, world_size: expected both or neither, got one of them")
        self.rank, self.world_size = _place() if rank is None or world_size is None else (rank, world_size)
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"rank: expected a number from 0 on below world_size = {self.world_size}, got {self.rank}")
        try:
            data = schema.Data(
                train=shards, lanes=lanes, shuffle_window=shuffle_window, cache=cache, cache_gib=cache_gib,
                weights=list(weights) if weights else None, allow_pipe=allow_pipe,
            )  # fmt: skip
        except ValidationError as error:
            raise UserError(_first_of(error)) from error
        if lanes % self.world_size:
            raise UserError(f"lanes: expected a multiple of the {self.world_size} ranks, got {lanes}")
        if global_batch_size < 1 or global_batch_size % lanes:
            raise UserError(f"global_batch_size: expected a multiple of lanes = {lanes}, got {global_batch_size}")
        self.global_batch_size, self.per_item = global_batch_size, per_item
        self.local_batch_size = global_batch_size // self.world_size
        if per_item < 1 or self.local_batch_size % per_item:
            raise UserError(
                f"per_item: expected a divisor of a rank's {self.local_batch_size} samples of a batch, got {per_item}"
            )
        self._index = open_index(data, key="shards", captioned=False)
        self._order = Order(
            self._index.first_id, seed=seed, lanes=lanes, window=shuffle_window,
            parts=self._index.parts if weights else None, weights=data.weights,
        )  # fmt: skip
        self.num_samples, self.fingerprint = self._index.num_samples, self._index.fingerprint
        self.samples_per_epoch = self._order.samples_per_epoch
        self.samples = 0
        self.counts: Counter[str] = Counter()
        self._seed = seed
        self._identity = {
            "fingerprint": self.fingerprint, "seed": seed, "lanes": lanes, "shuffle_window": shuffle_window,
            "global_batch_size": global_batch_size, "weights": data.weights,
        }  # fmt: skip

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """From the present position on; K workers give every K-th item each."""
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        item = self.samples // self.world_size // self.per_item + worker
        step, visits = -1, self._order.visits(0, 0, 0)
        while True:
            wanted, first = divmod(item * self.per_item, self.local_batch_size)
            if wanted != step:
                step = wanted
                visits = self._order.batch(step, self.global_batch_size, self.rank, self.world_size)
            own = slice(first, first + self.per_item)
            for sample, number in zip(visits.ids[own].tolist(), visits.passes[own].tolist(), strict=True):
                yield self._read(sample, number)
            item += workers

    def follow(self, loader: Iterable[T]) -> Iterator[T]:
        """The loader's items, counted as they are handed out: what `state_dict` tells.

        Args:
            loader: a pipeline that begins with this source, or a loader of it with any number of workers. It begins
                where `samples` is when this is called, and is left there.
        """
        for item in loader:
            self.samples += self.per_item * self.world_size
            yield item

    def seek(self, samples: int) -> None:
        """Begin after so many samples of all ranks together, in loaders that are started from now on.

        Raises:
            UserError: an item of the pipeline would be cut there.
        """
        if samples < 0 or samples % (self.per_item * self.world_size):
            raise UserError(
                f"samples: expected a multiple of {self.per_item} per item x {self.world_size} ranks, got {samples}; "
                f"whole batches ({self.global_batch_size}) always are"
            )
        self.samples = samples

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it belongs to; the same on all ranks that have taken as many steps."""
        return {"samples": self.samples, "ranks": self.world_size, **self._identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, on any number of ranks.

        Raises:
            UserError: it is a position in another order or in other shards; or on another number of ranks, and
                inside a batch.
        """
        for name, value in self._identity.items():
            if state.get(name) != value:
                raise UserError(
                    f"{name}: expected {state.get(name)!r} (from the saved position), got {value!r}: the position "
                    "means nothing there; restore it, or start from the beginning"
                )
        samples = int(state["samples"])
        if state.get("ranks") != self.world_size and samples % self.global_batch_size:
            raise UserError(
                f"samples: expected a position between batches of {self.global_batch_size} to go on from "
                f"{state.get('ranks')} ranks to {self.world_size}, got {samples}"
            )
        self.seek(samples)

    def close(self) -> None:
        """Close the shards."""
        self._index.close()

    def _read(self, sample: int, number: int) -> dict[str, Any]:
        """The sample, or the first of its replacements that can be read: those that `TrainLoader` takes too."""
        draws, used = Draws(self._seed, Purpose.REPLACEMENT, number, sample), sample
        for _ in range(_ATTEMPTS):
            shard, row = self._index.locate(used)
            reader = self._index.reader(shard)
            try:
                check_whole(reader, row)
                members = reader.read(row, frozenset(reader.members.extensions))
                found: dict[str, Any] = {"__key__": reader.key(row), "__url__": reader.url}
                return found | members | {"__id__": used, "__pass__": number}
            except BadSampleError as error:
                self.counts[error.kind] += 1
                if self.counts.total() <= _LOGGED:
                    log.warning("%s: sample %s (id %d): %s", reader.url, reader.key(row), used, error)
            used = draws.below(self.num_samples)
        raise UserError(f"shards: sample {sample} cannot be read, and neither can {_ATTEMPTS:,} others in its place")


def _first_of(error: ValidationError) -> str:
    first = error.errors()[0]
    name = "shards" if first["loc"][0] == "train" else first["loc"][0]
    return f"{name}: {first['msg']}, got {first['input']!r}"


def _place() -> tuple[int, int]:
    """This process among the ranks, whether or not they have met."""
    if collectives.world_size() > 1:
        return collectives.rank(), collectives.world_size()
    info = read_rank_info()
    return info.rank, info.world_size
