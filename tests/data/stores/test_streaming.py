"""Remote shards held in shared memory: the same batches, below their bound, and nothing left behind."""

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from amclr_scale.data import remote
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.storage import Storage
from amclr_scale.data.streaming import Stream
from amclr_scale.errors import UserError
from tests.data.shards import settings, write_shards
from tests.data.test_loader import assert_same, take

SIZES = [9, 4, 12, 7]


def indexed(served, tmp_path, sizes):
    """An index of remote shards; their local paths; the bytes of the largest."""
    folder, address, handler = served
    local = write_shards(folder, sizes)
    storage = Storage(tmp_path / "other", 10**9)
    urls = [f"{address}/{Path(url).name}" for url in local]
    write_index(tmp_path / "index.json", "x", build(urls, [tmp_path / f"{i}.npz" for i in range(len(urls))], storage))
    handler.log.clear()
    return str(tmp_path / "index.json"), local, max(map(os.path.getsize, local))


@pytest.mark.parametrize("stream", [False, True])
def test_the_ranks_of_a_machine_share_its_cache_and_its_memory(served, memory, tmp_path, monkeypatch, stream):
    """Room for one rank's windows alone: all of them would fetch every shard for every sample."""
    index, _, size = indexed(served, tmp_path, [6] * 12)
    room = int(3.5 * size)  # a rank reads two shards at once
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**40, free=room))
    data = settings(index, shuffle_window=1, cache=str(tmp_path / "cache"), cache_gib=room / 2**30, stream=stream)
    TrainLoader(data, seed=0, global_batch_size=4, world_size=4).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = r"data\.stream: .* machine's ranks" if stream else r"data\.cache_gib: .* 4 shards .* machine's 2 ranks"
    with pytest.raises(UserError, match=f"^{words} read at once"):
        TrainLoader(data, seed=0, global_batch_size=4, world_size=4)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_streamed_shards_stay_in_memory_and_below_their_bound(served, memory, tmp_path, workers):
    index, local, size = indexed(served, tmp_path, [6] * 12)
    options = {"lanes": 2, "shuffle_window": 2}
    loader = TrainLoader(
        settings(index, cache=str(tmp_path / "cache"), stream=True, **options),
        seed=0, global_batch_size=6, workers=workers,
    )  # fmt: skip
    for batch in take(settings(local, **options), 36, global_batch_size=6):
        assert_same([next(loader)], [batch])
        held = sum(sizes(memory.glob("*/*.tar")))
        assert held <= (8 + 4) * size  # two windows of two lanes, and what is being fetched just now
    assert len(list(memory.iterdir())) == 1
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert 24 < len(served[2].log) <= 60  # three epochs of twelve, of which eight are held at a time
    loader.close()
    assert not list(memory.iterdir())


def sizes(paths):
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            yield path.stat().st_size


def test_streaming_without_an_index_and_in_evaluation_holds_one_shard(served, memory, tmp_path):
    folder, address, _ = served
    local = write_shards(folder, SIZES)
    urls = f"{address}/{{00000..00003}}.tar"
    streamed, plain = (EvaluationSplit(name, settings(name, stream=True)) for name in (urls, str(folder)))
    assert streamed.captions == plain.captions
    for ours, theirs in zip(streamed.batches(5), plain.batches(5), strict=True):
        assert_same([ours], [theirs])
        assert len(list(memory.glob("*/*.tar"))) == 1
    assert_same(take(settings(urls, stream=True), 8), take(settings(local), 8))


def test_too_little_memory_is_told(served, memory, tmp_path, monkeypatch):
    index, _, _ = indexed(served, tmp_path, SIZES)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2**40, free=1000))
    with pytest.raises(
        UserError, match=r"data\.stream: expected .* GiB of shared memory .* lower data\.shuffle_window"
    ):
        TrainLoader(settings(index, stream=True), seed=0, global_batch_size=8)
    memory.rename(tmp_path / "gone")
    with pytest.raises(UserError, match=r"data\.stream: expected shared memory in .*memory"):
        Stream().folder()


def test_what_a_killed_process_left_in_memory_is_removed(memory):
    code = (
        "import os, sys; from pathlib import Path; from amclr_scale.data.streaming import Stream\n"
        "s = Stream(Path(sys.argv[1])); (s.folder() / 'a.tar').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(memory)], check=False).returncode == -9
    (left,) = memory.iterdir()
    first, second = Stream(), Stream()
    mine = first.folder()
    assert not left.exists()
    second.folder()
    assert mine.is_dir()  # of a process that lives
    del first, second
    assert not list(memory.iterdir())


def test_a_fetch_under_way_when_a_loader_closes_leaves_nothing_in_memory(served, memory, tmp_path, monkeypatch):
    folder, address, _ = served
    write_shards(folder, [4])
    begun, closed = threading.Event(), threading.Event()
    real = remote.fetch

    def slow(url, target, largest, key):
        begun.set()
        assert closed.wait(60)
        real(url, target, largest, key)

    monkeypatch.setattr("amclr_scale.data.storage.fetch", slow)
    storage = Storage(tmp_path / "cache", 10**9, stream=Stream())
    with ThreadPoolExecutor(1) as threads:
        fetching = threads.submit(storage.local_path, f"{address}/00000.tar")
        assert begun.wait(60)
        storage.stream.close()
        closed.set()
        with pytest.raises(UserError, match="cannot be fetched"):
            fetching.result(60)
    with pytest.raises(UserError, match=r"data\.stream: .* closed"):
        storage.local_path(f"{address}/00000.tar")
    assert not list(memory.iterdir())


def test_a_folder_in_memory_that_another_rank_sweeps_away_at_once_is_made_again(memory, monkeypatch):
    flock, swept = fcntl.flock, []

    def sweep_first(file, how):
        if not swept:
            swept.extend(memory.iterdir())
            shutil.rmtree(swept[0])
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    stream = Stream()
    assert stream.folder().is_dir()
    assert [stream.folder()] == list(memory.iterdir()) != swept
    stream.close()
