"""Remote shards give the same batches; the cache stays below its bound; a dead store is told."""

import contextlib
import fcntl
import functools
import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from amclr_scale.data import remote, streaming
from amclr_scale.data.evaluation_split import EvaluationSplit
from amclr_scale.data.index import write_index
from amclr_scale.data.indexing import build, open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.remote import fetch, make_room
from amclr_scale.data.storage import Storage
from amclr_scale.data.streaming import Stream
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar
from tests.data.test_loader import assert_same, take


class _Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; a path in `failures` fails that often, in the way that is asked for."""

    failures: dict[str, list[str]]
    log: list[str]

    def do_GET(self):
        self.log.append(self.path)
        way = self.failures.get(self.path, []).pop(0) if self.failures.get(self.path) else ""
        if way == "refuse":
            self.send_error(503)
        elif way == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "100000")
            self.end_headers()
            self.wfile.write(b"x" * 1000)
            self.close_connection = True
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A folder, its address, and what the server was asked."""
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    folder = tmp_path / "served"
    folder.mkdir()
    handler = type("Handler", (_Server,), {"failures": {}, "log": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()


SIZES = [9, 4, 12, 7]


def test_the_same_batches_from_everywhere(served):
    folder, address, handler = served
    local = write_shards(folder, SIZES)
    expected = take(settings(local), 12)
    pipes = [f"pipe:cat {shlex.quote(url)}" for url in local]
    for urls, workers in [(f"{address}/{{00000..00003}}.tar", 0), (f"{address}/{{00000..00003}}.tar", 2), (pipes, 0)]:
        assert_same(take(settings(urls, allow_pipe=True), 12, workers=workers), expected)
    assert len([path for path in handler.log if path.endswith(".tar")]) == 4  # once per machine, for both runs


def test_through_fsspec(served):
    local = write_shards(served[0], SIZES)
    memory = pytest.importorskip("fsspec").filesystem("memory")
    for url in local:
        memory.pipe(f"/shards/{Path(url).name}", Path(url).read_bytes())
    assert_same(take(settings("memory://shards/{00000..00003}.tar"), 6), take(settings(local), 6))


def test_compressed_ones_are_unpacked_on_the_way(served):
    folder, address, _ = served
    members = [m for i in range(12) for m in pair(i)]
    write_tar(folder / "a.tar", members)
    write_tar(folder / "b.tar.gz", members, "w:gz")
    assert_same(take(settings(f"{address}/b.tar.gz"), 3), take(settings(str(folder / "a.tar")), 3))


def test_the_cache_stays_below_its_bound(served, tmp_path):
    """Twenty shards through room for six: some are fetched again, the batches are the same, the bound holds."""
    folder, address, handler = served
    local = write_shards(folder, [6] * 20)
    size = os.path.getsize(local[0])
    index = tmp_path / "index.json"
    urls = [f"{address}/{Path(url).name}" for url in local]
    storage = Storage(tmp_path / "other", 10**9)
    write_index(index, "x", build(urls, [tmp_path / f"{i}.npz" for i in range(20)], storage))
    handler.log.clear()
    options = {"lanes": 1, "shuffle_window": 2}
    loader = TrainLoader(
        settings(str(index), cache=str(tmp_path / "cache"), cache_gib=6.5 * size / 2**30, **options),
        seed=0, global_batch_size=6,
    )  # fmt: skip
    expected = take(settings(local, **options), 60, global_batch_size=6)
    for batch in expected:
        assert_same([next(loader)], [batch])
        held = 0
        for path in (tmp_path / "cache/fetched").glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                held += path.stat().st_size
        assert held <= 8 * size  # the bound, and what is being fetched just now
    loader.close()
    assert 50 <= len(handler.log) <= 75  # three epochs of twenty


def test_a_cache_that_is_too_small_is_told(served):
    folder, address, _ = served
    write_shards(folder, SIZES)
    with pytest.raises(UserError, match=r"data\.cache_gib: expected room for the 4 shards"):
        TrainLoader(settings(f"{address}/{{00000..00003}}.tar", cache_gib=1e-5), seed=0, global_batch_size=8)


@pytest.mark.parametrize("stream", [False, True])
def test_the_ranks_of_a_machine_share_its_cache_and_its_memory(served, memory, tmp_path, monkeypatch, stream):
    """Room for one rank's windows alone: all of them would fetch every shard for every sample."""
    index, _, size = indexed(served, tmp_path, [6] * 12)
    room = int(3.5 * size)  # a rank reads two shards at once
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    data = settings(index, shuffle_window=1, cache=str(tmp_path / "cache"), cache_gib=room / 2**30, stream=stream)
    TrainLoader(data, seed=0, global_batch_size=4, world_size=4).close()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    words = r"data\.stream: .* machine's ranks" if stream else r"data\.cache_gib: .* 4 shards .* machine's 2 ranks"
    with pytest.raises(UserError, match=f"^{words} read at once"):
        TrainLoader(data, seed=0, global_batch_size=4, world_size=4)


@pytest.mark.parametrize("way", ["refuse", "cut"])
def test_a_store_that_stumbles_is_asked_again(served, caplog, way):
    folder, address, handler = served
    write_shards(folder, [5])
    handler.failures["/00000.tar"] = [way] * 3
    assert open_index(settings(f"{address}/00000.tar")).num_samples == 5
    assert sum("attempt" in record.message for record in caplog.records) == 3


def test_errors_of_a_stores_own_library_are_tried_again_and_told(tmp_path, monkeypatch, caplog):
    """gcsfs, botocore and aiohttp raise errors that are no OSError."""
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.get_filesystem_class("memory")
    raised: list[type[Exception]] = []

    class Shaky(memory):
        protocol = "shaky"

        @classmethod
        def _strip_protocol(cls, path):
            return "/" + path.removeprefix("shaky://").strip("/")

        def _open(self, *args, **keys):
            if raised:
                raise raised.pop()("of its own")
            return super()._open(*args, **keys)

    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    fsspec.register_implementation("shaky", Shaky, clobber=True)
    Shaky().pipe("/x/a.tar", write_tar(tmp_path / "a.tar", pair(0)).read_bytes())
    raised += [RuntimeError] * 4
    fetch("shaky://x/a.tar", tmp_path / "b.tar")
    assert (tmp_path / "b.tar").read_bytes() == (tmp_path / "a.tar").read_bytes()
    assert len(caplog.records) == 4
    raised += [RuntimeError] * 5
    with pytest.raises(UserError, match=r"a\.tar: cannot be fetched after 5 attempts: of its own"):
        fetch("shaky://x/a.tar", tmp_path / "c.tar")
    with pytest.raises(UserError, match=r"nothing\.tar: cannot be fetched: "):  # at once
        fetch("shaky://x/nothing.tar", tmp_path / "c.tar")
    with pytest.raises(UserError, match="cannot be fetched: Invalid IPv6 URL"):
        fetch("http://[::1/a.tar", tmp_path / "c.tar")


def test_a_dead_store_is_told(served):
    folder, address, handler = served
    write_shards(folder, [5])
    handler.failures["/00000.tar"] = ["refuse"] * 99
    with pytest.raises(UserError, match=r"00000\.tar: cannot be fetched after 5 attempts: .*503"):
        open_index(settings(f"{address}/00000.tar"))
    with pytest.raises(UserError, match=r"nothing\.tar: cannot be fetched: .*404"):  # at once
        open_index(settings(f"{address}/nothing.tar"))


def test_a_store_that_dies_during_training_is_told(served, tmp_path):
    folder, address, _ = served
    local = write_shards(folder, [6] * 8)
    index = tmp_path / "index.json"
    urls = [f"{address}/{Path(url).name}" for url in local]
    write_index(index, "x", build(urls, [tmp_path / f"{i}.npz" for i in range(8)], Storage(tmp_path / "other", 10**9)))
    for workers in (0, 1):
        data = settings(str(index), cache=str(tmp_path / f"cache{workers}"))
        loader = TrainLoader(data, seed=0, global_batch_size=4, workers=workers)
        for url in local:
            Path(url).unlink(missing_ok=True)
        with pytest.raises(UserError, match="cannot be fetched"):
            next(loader)
        loader.close()


def test_commands_are_refused_unless_allowed(tmp_path):
    trap = tmp_path / "sprung"
    with pytest.raises(UserError, match=r"data\.allow_pipe: pipe:touch .* would run a shell command"):
        open_index(settings(f"pipe:touch {trap}"))
    assert not trap.exists()


def test_a_command_that_fails_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    whole = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in pair(i)])
    for command, words in [
        ("false", "exit code 1"),
        (f"head -c 3000 {whole}; exit 3", "exit code 3"),
        ("true", "no data"),
    ]:
        with pytest.raises(UserError, match=rf"cannot be fetched after 5 attempts: .*{words}"):
            open_index(settings(f"pipe:{command}", allow_pipe=True))


def test_unknown_protocols_are_told():
    with pytest.raises(UserError, match="cannot be fetched: Protocol not known"):
        open_index(settings("nonsense://a/0.tar"))


def test_a_changed_remote_shard_is_refused(served, tmp_path):
    folder, address, _ = served
    write_shards(folder, [5])
    index = tmp_path / "index.json"
    storage = Storage(tmp_path / "other", 10**9)
    write_index(index, "x", build([f"{address}/00000.tar"], [tmp_path / "0.npz"], storage))
    write_tar(folder / "00000.tar", [m for i in range(6, 12) for m in pair(i)])
    with pytest.raises(UserError, match="has changed since it was indexed"):
        take(settings(str(index)), 2)


def test_the_least_recently_used_goes_first(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.tar").write_bytes(bytes(10))
        os.utime(tmp_path / f"{i}.tar", (i, i))
    os.utime(tmp_path / "0.tar", (9, 9))
    make_room(tmp_path, 30, tmp_path / "1.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.tar", "1.tar", "4.tar"]


def test_half_a_fetch_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FIRST_PAUSE", 0.01)
    with pytest.raises(UserError):
        fetch("pipe:echo half; exit 1", tmp_path / "a.tar")
    assert list(tmp_path.iterdir()) == []


def test_an_index_names_remote_shards(served, tmp_path):
    folder, address, _ = served
    write_shards(folder, SIZES)
    shards = [{"url": f"{address}/{i:05d}.tar", "nsamples": n} for i, n in enumerate(SIZES)]
    (tmp_path / "own.json").write_text(json.dumps({"shardlist": shards}))
    assert open_index(settings(str(tmp_path / "own.json"))).num_samples == sum(SIZES)


@pytest.fixture
def memory(tmp_path, monkeypatch):
    """A folder in place of the machine's shared memory."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(streaming, "MEMORY", folder)
    return folder


def indexed(served, tmp_path, sizes):
    """An index of remote shards; their local paths; the bytes of the largest."""
    folder, address, handler = served
    local = write_shards(folder, sizes)
    storage = Storage(tmp_path / "other", 10**9)
    urls = [f"{address}/{Path(url).name}" for url in local]
    write_index(tmp_path / "index.json", "x", build(urls, [tmp_path / f"{i}.npz" for i in range(len(urls))], storage))
    handler.log.clear()
    return str(tmp_path / "index.json"), local, max(map(os.path.getsize, local))


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_shards_stay_in_memory_and_below_their_bound(served, memory, tmp_path, workers):
    index, local, size = indexed(served, tmp_path, [6] * 12)
    options = {"lanes": 2, "shuffle_window": 2}
    loader = TrainLoader(
        settings(index, cache=str(tmp_path / "cache"), stream=True, **options),
        seed=0, global_batch_size=6, workers=workers,
    )  # fmt: skip
    for batch in take(settings(local, **options), 36, global_batch_size=6):
        assert_same([next(loader)], [batch])
        held = sum(path.stat().st_size for path in present(memory.glob("*/*.tar")))
        assert held <= (8 + 4) * size  # two windows of two lanes, and what is being fetched just now
    assert len(list(memory.iterdir())) == 1
    assert not list((tmp_path / "cache").rglob("*.tar"))
    assert 24 < len(served[2].log) <= 60  # three epochs of twelve, of which eight are held at a time
    loader.close()
    assert not list(memory.iterdir())


def present(paths):
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed since it was listed
            path.stat()
            yield path


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
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
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

    def slow(url, target):
        begun.set()
        assert closed.wait(60)
        real(url, target)

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
