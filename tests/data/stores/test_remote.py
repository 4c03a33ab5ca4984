"""Remote shards give the same batches; the cache stays below its bound; a dead store is told."""

import contextlib
import gzip
import json
import os
import shlex
from pathlib import Path

import pytest

from amclr_scale.data import remote
from amclr_scale.data.indexes.entries import write_index
from amclr_scale.data.indexing import build, open_index
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.remote import fetch, make_room
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar
from tests.data.test_loader import assert_same, take

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


def test_through_webdatasets_openers(served, tmp_path, monkeypatch):
    """Of a store that fsspec does not know: the program that they run, and its failure half-way."""
    local = write_shards(served[0], SIZES)
    program = tmp_path / "bin" / "ais"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncat {served[0]}/"${{2##*/}}"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    urls = "ais://bucket/{00000..00003}.tar"
    assert_same(take(settings(urls), 6), take(settings(local), 6))
    program.write_text(f'#!/bin/sh\nhead -c 5000 {served[0]}/"${{2##*/}}"\nexit 1\n')
    with pytest.raises(UserError, match=r"other/0\.tar.*exit"):
        fetch("ais://other/0.tar", tmp_path / "0.tar")
    assert not (tmp_path / "0.tar").exists()


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


@pytest.mark.parametrize("way", ["refuse", "cut"])
def test_a_store_that_stumbles_is_asked_again(served, caplog, way):
    folder, address, handler = served
    write_shards(folder, [5])
    handler.failures["/00000.tar"] = [way] * 3
    assert open_index(settings(f"{address}/00000.tar")).num_samples == 5
    ours = [record.message for record in caplog.records if address in record.message]  # not of a loader of before
    assert sum("attempt" in message for message in ours) == 3


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


@pytest.mark.parametrize("protocol", ["", "__default__"])
def test_an_address_without_a_protocol_is_no_path(tmp_path, monkeypatch, protocol):
    """Which libraries take it for; an index may say so."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{protocol}:").mkdir()
    (tmp_path / f"{protocol}:" / "0.tar").write_bytes(b"x")
    with pytest.raises(UserError, match=r"cannot be fetched: expected an address with its protocol, such as s3://"):
        fetch(f"{protocol}://0.tar", tmp_path / "fetched.tar")


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
    make_room([tmp_path], 30, tmp_path / "1.tar")
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


def test_a_store_that_sends_a_byte_now_and_then_is_given_up(served, monkeypatch):
    _, address, handler = served
    monkeypatch.setattr(remote, "TIMEOUT", 0.3)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    handler.failures["/a.tar"] = ["slow"] * 2
    with pytest.raises(
        UserError, match=r"a\.tar: cannot be fetched after 2 attempts: \d+ bytes in 0 s: slower than 4,096"
    ):
        open_index(settings(f"{address}/a.tar"))


@pytest.mark.parametrize("far", [False, True])
def test_a_shard_that_unpacks_into_more_than_is_allowed(served, tmp_path, far):
    """Thirty kilobytes that become thirty megabytes: nothing of them stays."""
    folder, address, _ = served
    (folder / "bomb.tar.gz").write_bytes(gzip.compress(bytes(30 << 20)))
    place, cache = address if far else folder, tmp_path / "cache"
    data = settings(f"{place}/bomb.tar.gz", cache=str(cache), max_shard_gib=0.01)
    with pytest.raises(UserError, match=r"^data\.max_shard_gib: expected shards of at most 0\.01 GiB.*bomb\.tar\.gz"):
        open_index(data)
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) == 0


def test_what_is_unpacked_counts_towards_the_bound_too(served, tmp_path):
    folder, cache = served[0], tmp_path / "cache"
    for number in range(6):
        members = [m for i in range(6) for m in pair(6 * number + i)]
        write_tar(folder / "plain" / f"{number:05d}.tar", members)
        write_tar(folder / "packed" / f"{number:05d}.tar.gz", members, "w:gz")
    size = (folder / "plain" / "00000.tar").stat().st_size
    options = {"lanes": 1, "shuffle_window": 2}
    packed = settings(
        f"{folder}/packed/{{00000..00005}}.tar.gz", cache=str(cache), cache_gib=3.5 * size / 2**30, **options
    )
    expected = take(settings(f"{folder}/plain/{{00000..00005}}.tar", **options), 12, global_batch_size=6)
    assert_same(take(packed, 12, global_batch_size=6), expected)
    assert len(list((cache / "unpacked").glob("*.tar"))) <= 3


def test_what_is_no_shard_is_told_by_its_address_and_not_kept(served, tmp_path):
    """The page of a server that wants a password; then half a shard; then the shard."""
    folder, address, _ = served
    data = settings(f"{address}/00000.tar", cache=str(tmp_path / "cache"))
    (folder / "00000.tar").write_text("<html>" + "please log in " * 100)
    with pytest.raises(
        UserError, match=rf"^data\.train: {address}/00000\.tar: what was fetched is no shard .*removed from the cache"
    ):
        open_index(data)
    assert not list((tmp_path / "cache" / "fetched").glob("*.tar"))
    whole = Path(write_shards(folder, [6])[0]).read_bytes()
    (folder / "00000.tar").write_bytes(whole[: len(whole) // 2])
    assert 0 < open_index(data).num_samples < 6
    assert not list((tmp_path / "cache" / "fetched").glob("*.tar"))
    (folder / "00000.tar").write_bytes(whole)
    assert open_index(data).num_samples == 6
