"""Checkpoints of a store in the cache: the newest one that was asked for, and those that somebody reads."""

import errno
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem

from amclr_scale.checkpoint import cached, files
from amclr_scale.checkpoint.cached import local_copy
from amclr_scale.checkpoint.remote import RemoteRun
from amclr_scale.data import remote as stores
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import METRICS
from tests.checkpoint.test_files import configuration, flipped, write

NAME = files.name_of(10)


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The address of a run with checkpoints of steps 10 and 20."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "FIRST_PAUSE", 0.0)
    config = configuration(tmp_path)
    for step in (10, 20):
        write(tmp_path, step, config)
    (tmp_path / "a" / METRICS).write_text('{"step": 10}\n')
    return f"file://{tmp_path}/a"


def full_after(files, monkeypatch):
    """The disk takes so many files, and half of the next; the list of what was asked for."""
    calls, get_file = [], LocalFileSystem.get_file

    def filling(self, far, near, **how):
        calls.append(far)
        if len(calls) == files + 1:
            Path(near).write_bytes(Path(far).read_bytes()[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        get_file(self, far, near, **how)

    monkeypatch.setattr(LocalFileSystem, "get_file", filling)
    return calls


def test_the_cache_holds_one_checkpoint_of_a_run(far):
    older = local_copy(f"{far}/checkpoints/{NAME}", "checkpoint").path
    newer = local_copy(far, "checkpoint").path
    assert (older.name, newer.name, newer.parent.parent.name) == (NAME, files.name_of(20), "a")
    assert (newer.parent.parent / METRICS).is_file()
    names = {path.name for path in newer.parent.iterdir()}
    assert names == {"latest", newer.name, f".{newer.name}.reading"}


def test_what_somebody_reads_stays(far):
    """A process, or a model in this one: locks are of whoever has opened the file."""
    old = f"{far}/checkpoints/{NAME}"
    readers = [local_copy(old, "checkpoint") for _ in range(2)]
    newer = local_copy(far, "checkpoint")
    readers.pop()
    assert files.steps(local_copy(far, "checkpoint").path.parent) == [20, 10]
    assert files.fault(readers[0].path) is None
    assert local_copy(old, "checkpoint").path == readers[0].path
    assert files.fault(newer.path) is None  # it is read, too
    readers.pop()
    assert files.steps(local_copy(far, "checkpoint").path.parent) == [20]


def test_what_is_read_is_not_replaced_by_another_of_the_same_name(far, tmp_path, monkeypatch):
    """As after a run that went back and came to the same step again."""
    waits, alone = [], cached.LocalCopy.alone
    copy = local_copy(f"{far}/checkpoints/{NAME}", "checkpoint")

    def told(self, wait=False):
        if wait:
            waits.append((copy.path / files.MANIFEST).read_bytes())
            copy.close()
        return alone(self, wait)

    monkeypatch.setattr(cached.LocalCopy, "alone", told)
    local_copy(f"{far}/checkpoints/{NAME}", "checkpoint")
    assert waits == []
    there = tmp_path / "a" / "checkpoints" / NAME
    before = (there / files.MANIFEST).read_bytes()
    files.remove(there)
    write(tmp_path, 10, configuration(tmp_path), number=7)
    local_copy(f"{far}/checkpoints/{NAME}", "checkpoint")
    assert waits == [before]
    assert (copy.path / files.MANIFEST).read_bytes() == (there / files.MANIFEST).read_bytes() != before


def test_a_disk_without_room_is_told_before_anything_is_fetched(far, tmp_path, monkeypatch):
    usage = partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(200))
    got = []
    get = RemoteRun.get
    monkeypatch.setattr(RemoteRun, "get", lambda self, name, path: (got.append(name), get(self, name, path)))
    with pytest.raises(UserError, match=r"^XDG_CACHE_HOME: expected .* bytes free in .*/checkpoints for checkpoint "):
        local_copy(far, "checkpoint")
    assert got == []
    assert not any(path.is_file() and path.stat().st_size for path in (tmp_path / "cache").rglob("*"))


def test_a_disk_with_room_for_one_keeps_the_newest_that_was_asked_for(far, monkeypatch):
    """What nobody reads goes first; what somebody reads stays, and then there is no room."""
    older = local_copy(f"{far}/checkpoints/{NAME}", "checkpoint")
    there, usage = older.path, partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(200 if there.exists() else 2**30))
    with pytest.raises(UserError, match=r"^XDG_CACHE_HOME: expected .* bytes free"):
        local_copy(far, "checkpoint")
    assert files.fault(there) is None
    older.close()
    newer = local_copy(far, "checkpoint").path
    assert files.steps(newer.parent) == [20]
    monkeypatch.setattr("shutil.disk_usage", lambda path: namedtuple("usage", "total free")(0, 0))
    assert local_copy(f"{far}/checkpoints/{NAME}", "checkpoint").path == there  # a file system that tells no sizes


def test_a_cache_that_cannot_be_used_is_told_by_the_key_that_says_where_it_is(far, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for place in (f"{tmp_path}/file", f"{tmp_path}/file/within"):
        monkeypatch.setenv("XDG_CACHE_HOME", place)
        with pytest.raises(UserError, match=r"^XDG_CACHE_HOME: expected a folder that can be written, got .*file"):
            local_copy(far, "checkpoint")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(UserError, match=r"^XDG_CACHE_HOME: .* has no file locks \(No locks available\); set XDG_"):
        local_copy(far, "checkpoint")


def test_a_disk_that_is_full_half_way_keeps_nothing_half(far, tmp_path, monkeypatch):
    calls = full_after(2, monkeypatch)
    with pytest.raises(
        UserError, match=r"^XDG_CACHE_HOME: the disk of .* is full \(No space left on device\); nothing"
    ):
        local_copy(far, "checkpoint")
    assert len(calls) == 3  # a full disk does not become less so by trying again
    assert not any(path.is_file() and path.stat().st_size for path in (tmp_path / "cache").rglob("*"))
    assert files.fault(local_copy(far, "checkpoint").path) is None


def test_a_damaged_one_is_passed_over(far, tmp_path):
    flipped(tmp_path / "a" / "checkpoints" / files.name_of(20) / "rank_00000.safetensors")
    copy = local_copy(far, "checkpoint")
    assert {path.name for path in copy.path.parent.iterdir()} == {"latest", NAME, f".{NAME}.reading"}
