"""A disk without room for shards is told in words, as early as it can be known, and keeps no half shard."""

import errno
import gzip
from collections import namedtuple

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
    usage = namedtuple("usage", "free")
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
    storage, usage = Storage(tmp_path / "cache", allow_pipe=True), namedtuple("usage", "free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(free))

    def full(source, out, *_):
        out.write(source.read(700))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(remote, "write_bounded", full)
    said = r"expected 0\.0 MiB free in .* for http" if free == 100 else r"the disk of .* is full \(No space left on de"
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
