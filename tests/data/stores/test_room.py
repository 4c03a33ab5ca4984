"""A disk without room for shards is told in words, as early as it can be known, and keeps no half shard."""

import errno
import gzip
import os
from collections import namedtuple
from functools import partial

import pytest

from amclr_scale.data import remote
from amclr_scale.data.storage import Storage
from amclr_scale.errors import UserError
from tests.data.shards import settings, write_shards
from tests.data.test_loader import take

SIZES = [9, 4, 12, 7]


def test_a_disk_that_the_cache_would_fill_is_told_before_training(served, tmp_path, monkeypatch):
    folder, address, _ = served
    write_shards(folder, SIZES)
    data = settings(f"{address}/{{00000..00003}}.tar", cache=str(tmp_path / "cache"))
    take(data, 1)  # which leaves an index
    shards = sorted((tmp_path / "cache" / "fetched").glob("*.tar"))
    sizes = [path.stat().st_size for path in shards]
    usage = partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(max(sizes)))
    take(data, 1)  # all of them are there
    for path in shards[:2]:
        path.unlink()
    told = rf"^data\.cache_gib: expected {sum(sizes[:2]) / 2**30:.3g} GiB free in .*, got {max(sizes) / 2**30:.3g}; set"
    with pytest.raises(UserError, match=told):
        take(data, 1)
    held, room = sum(sizes[2:]), max(sizes)  # as much as the words say is not too much
    Storage(tmp_path / "cache", held + room).check_room([("http://elsewhere/0.tar", 10**9)], 10**9)


@pytest.mark.parametrize("free", [100, 2**40])
def test_a_full_disk_is_told_at_once_and_keeps_no_half(served, tmp_path, monkeypatch, free):
    """Before anything is fetched where the store says how much there is; and where it only shows on the way."""
    folder, address, handler = served
    write_shards(folder, SIZES)
    storage, usage = Storage(tmp_path / "cache", allow_pipe=True), partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(free))

    def full(source, out, *_):
        out.write(source.read(700))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "write_bounded", full)
    said = r"expected .* bytes free in .* for http" if free == 100 else r"the disk of .* is full \(No space left on de"
    with pytest.raises(UserError, match=rf"^data\.cache: {said}") as told:
        storage.local_path(f"{address}/00000.tar")
    assert str(told.value).endswith("set data.cache to a larger disk, or lower data.cache_gib")
    assert handler.log.count("/00000.tar") == 1
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".lock"}
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress((folder / "00000.tar").read_bytes()))
    monkeypatch.setattr("amclr_scale.data.storage.write_bounded", full)
    with pytest.raises(UserError, match=r"^data\.cache: (expected|the disk)"):
        storage.local_path(str(packed))
    assert {path.suffix for path in (tmp_path / "cache").rglob("*") if path.is_file()} == {".lock"}


def test_shards_that_were_not_used_for_longest_make_room_on_a_full_disk(served, tmp_path, monkeypatch):
    """A cache that may take all of the disk is full before it has come to its bound."""
    folder, address, _ = served
    write_shards(folder, SIZES)
    storage = Storage(tmp_path / "cache", 2**40)
    first, second = (storage.local_path(f"{address}/0000{n}.tar") for n in range(2))
    os.utime(first, (1, 1))
    usage = partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100 if first.exists() else 2**30))
    third = storage.local_path(f"{address}/00002.tar")
    assert (first.exists(), second.exists(), third.exists()) == (False, True, True)
    packed = tmp_path / "0.tar.gz"
    packed.write_bytes(gzip.compress((folder / "00003.tar").read_bytes()))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100 if third.exists() else 2**30))
    os.utime(third, (1, 1))
    assert storage.local_path(str(packed)).read_bytes() == (folder / "00003.tar").read_bytes()
    assert (second.exists(), third.exists()) == (True, False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(100))
    with pytest.raises(UserError, match=r"^data\.cache: expected .* bytes free in .* for http"):
        storage.local_path(f"{address}/00000.tar")


def test_a_file_system_that_tells_no_sizes_is_tried(served, tmp_path, monkeypatch):
    """As many of FUSE: 0 of 0 bytes are free."""
    folder, address, _ = served
    write_shards(folder, SIZES)
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total free")(0, 0))
    storage = Storage(tmp_path / "cache", 2**40)
    storage.check_room([(f"{address}/00000.tar", 10**9)], 10**9)
    assert storage.local_path(f"{address}/00000.tar").read_bytes() == (folder / "00000.tar").read_bytes()


def test_what_a_killed_process_left_half_fetched_is_written_over(served, tmp_path):
    folder, address, _ = served
    write_shards(folder, SIZES)
    storage = Storage(tmp_path)
    path = storage.local_path(f"{address}/00000.tar")
    half = remote.partial_of(path)
    path.rename(half)
    half.write_bytes(b"x" * 10**6)
    assert storage.local_path(f"{address}/00000.tar").read_bytes() == (folder / "00000.tar").read_bytes()
    assert not half.exists()
