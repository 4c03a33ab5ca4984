"""A data set of very many shards, of which only what one rank touches is there; and that rank, played in a process.

Its index is whole. Shards and member tables are links to one sparse file and one table of a shard of that size, made
for the shards that the rank looks at or opens; so opening them is real, and reading a picture is not.
"""

import hashlib
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import psutil
from numpy.typing import NDArray

from amclr_scale.config import schema
from amclr_scale.data.formats.members import Members
from amclr_scale.data.index import Index
from amclr_scale.data.indexes.binary import write_binary_index
from amclr_scale.data.indexes.entries import Shard, write_index
from amclr_scale.data.indexing import open_index, share_of
from amclr_scale.data.order import Order
from amclr_scale.data.storage import Storage

T = TypeVar("T")
MEMBER = 13_500  # bytes of a picture, a caption and a JSON together, on average over three
JSON_PART = 20  # the JSON form is written and read for one shard in so many
SEED = 0


@dataclass(frozen=True)
class Size:
    """How large a job is simulated."""

    shards: int = 500_000
    samples: int = 10_000  # of each shard
    ranks: tuple[int, int] = (64, 1024)
    lanes: int = 1024
    batch: int = 65_536
    window: int = 16
    steps: int = 4  # that are played after the first

    @property
    def num_samples(self) -> int:
        return self.shards * self.samples


SMALL = Size(shards=640, samples=50, ranks=(4, 16), lanes=16, batch=256, window=4, steps=2)


def in_own_process(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function of a module in a process that has done nothing before, so that its memory is its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def name_of(shard: int) -> str:
    return f"{shard // 1000:03d}/{shard:06d}.tar"


def make_table(size: Size) -> Members:
    """Of a shard with a picture, a caption and a JSON for each sample."""
    rng, members = np.random.default_rng(SEED), 3 * size.samples
    sizes = rng.integers(50, 2 * MEMBER, members)
    blocks = 512 + -(-sizes // 512) * 512
    return Members(
        row_start=np.arange(0, members + 1, 3),
        offset=np.cumsum(blocks) - blocks + 512,
        size=sizes,
        header=rng.integers(0, 2**32, members, dtype=np.uint32),
        extension=np.tile(np.arange(3, dtype=np.uint8), size.samples),
        flag=np.zeros(size.samples, np.uint8),
        extensions=["jpg", "json", "txt"],
        digest=hashlib.sha256(b"a shard").hexdigest(),
        length=int(blocks.sum()) + 1024,
    )


def write_data(folder: Path, size: Size) -> dict[str, float]:
    """Write index, table and sparse shard; bytes and seconds of each."""
    table = make_table(size)
    table.save(folder / "table.npz")
    with (folder / "shard.tar").open("wb") as file:
        file.truncate(table.length)
    one = Shard("", size.samples, Path(), table.digest, table.counts(), table.length)
    shards = [
        replace(one, url=str(folder / name_of(n)), members=folder / "members" / f"{name_of(n)}.npz")
        for n in range(size.shards)
    ]
    began = time.process_time()
    write_binary_index(folder / "index.bin", shards)
    seconds = time.process_time() - began
    write_index(folder / "part.json", "part", shards[: size.shards // JSON_PART])
    found = {name: float((folder / name).stat().st_size) for name in ("index.bin", "part.json", "table.npz")}
    return {**found, "write": seconds, "shard": float(table.length)}


def order_of(size: Size, first_id: Any = None) -> Order:
    """The order of the samples."""
    first = np.arange(size.shards + 1, dtype=np.int64) * size.samples if first_id is None else first_id
    return Order(first, seed=SEED, lanes=size.lanes, window=size.window)


def link(folder: Path, size: Size, shards: set[int]) -> None:
    """Have these shards and their tables there."""
    for shard in sorted(shards):
        for place, target in ((folder / name_of(shard), "shard.tar"),
                              (folder / "members" / f"{name_of(shard)}.npz", "table.npz")):  # fmt: skip
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                place.symlink_to(folder / target)


def shards_of(size: Size, rank: int, ranks: int) -> set[int]:
    """Those that a rank looks at when it starts, and opens in the steps that are played."""
    order, found = order_of(size), set(share_of(size.shards, (rank, ranks)))
    for step in range(size.steps + 1):
        found |= set((order.batch(step, size.batch, rank, ranks).ids // size.samples).tolist())
    return found | {0}  # the largest


def _memory() -> float:
    return float(psutil.Process().memory_info().rss)


def play_rank(folder: Path, size: Size, rank: int, ranks: int) -> dict[str, float]:
    """What a rank does with the data: seconds, bytes, counts."""
    data = schema.Data(
        train=str(folder / "index.bin"), lanes=size.lanes, shuffle_window=size.window, cache=str(folder / "cache")
    )
    found, before = dict[str, float](), _memory()

    def timed(name: str, call: Callable[[], T]) -> T:
        began = time.perf_counter()
        answer = call()
        found[name] = time.perf_counter() - began
        return answer

    index = timed("open", lambda: open_index(data, share=(rank, ranks)))
    timed("fingerprint", lambda: index.fingerprint + index.shards.content())
    found["index memory"] = _memory() - before
    order = timed("order", lambda: order_of(size, index.first_id))
    timed("first batch", lambda: order.batch(0, size.batch, rank, ranks))
    timed("next batch", lambda: [order.batch(step, size.batch, rank, ranks) for step in range(1, 21)])
    found["next batch"] /= 20
    timed("seek", lambda: order.batch(7 * size.num_samples // size.batch, size.batch, rank, ranks))
    found["memory"] = _memory() - before
    found |= _open_shards(index, order, size, rank, ranks)
    return found


def _open_shards(index: Index, order: Order, size: Size, rank: int, ranks: int) -> dict[str, float]:
    """Open what the first steps read: shards in each step after the first, their seconds and their memory."""
    index.keep_open(size.lanes // ranks * size.window)
    before, opened, seconds = _memory(), list[int](), 0.0
    with mock.patch.object(Members, "load", side_effect=Members.load) as load:
        for step in range(size.steps + 1):
            ids = order.batch(step, size.batch, rank, ranks).ids.tolist()
            began, loads = time.perf_counter(), load.call_count
            for sample in ids:
                index.reader(index.locate(sample)[0])
            seconds = time.perf_counter() - began
            opened.append(load.call_count - loads)
    return {"opened first": float(opened[0]), "opened later": float(opened[-1]), "opening": seconds,
            "readers": float(len(index._readers)), "readers memory": _memory() - before}  # fmt: skip


def read_json(folder: Path) -> dict[str, float]:
    """The JSON form, as every rank reads it: seconds and bytes for its part of the shards."""
    from amclr_scale.data.indexes.entries import read_entries, shard_of

    before, began = _memory(), time.perf_counter()
    entries = read_entries(folder / "part.json")
    index = Index([shard_of(entry, folder) for entry in entries], Storage(folder))
    assert index.fingerprint
    return {"open": time.perf_counter() - began, "memory": _memory() - before}


def global_batch(size: Size) -> NDArray[np.int64]:
    """The ids of a real batch of all ranks."""
    found = []
    for first in range(0, size.lanes, 64):
        order = order_of(size)  # a new one: it keeps the windows of all lanes that it has served
        for lane in range(first, min(first + 64, size.lanes)):
            found.append(order.batch(0, size.batch, lane, size.lanes).ids)
    return np.concatenate(found)


def peak_memory() -> int:
    """Bytes that this process has had at most, and any that it has started."""
    return 1024 * max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
