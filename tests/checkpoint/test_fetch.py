"""What is fetched from an object store: the newest checkpoint that is whole, and what its run left beside it."""

import errno
import re
import shutil
from collections import namedtuple
from functools import partial
from pathlib import Path

import pytest

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.fetch import Source, source_of
from amclr_scale.checkpoint.remote import RemoteRun
from amclr_scale.errors import UserError
from amclr_scale.metrics.run_folder import METRICS
from tests.checkpoint import test_remote
from tests.checkpoint.test_files import configuration, flipped, write
from tests.checkpoint.test_remote import mirror

place = test_remote.place  # a fixture


def test_a_damaged_checkpoint_in_the_store_is_passed_over_in_words(place, tmp_path):
    folder, url, config = place
    write(tmp_path, 20, config, number=2)
    flipped(folder / "checkpoints" / files.name_of(20) / "rank_00001.safetensors")
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    away = configuration(tmp_path / "away", run__name="a", resume=url)
    found = source_of(away, tmp_path / "away" / "a").bring()
    assert found.checkpoint == tmp_path / "away" / "a" / "checkpoints" / files.name_of(10)
    assert re.search(r"step_00000020 is not used: rank_00001.safetensors is damaged", found.notes()[0])
    assert not list((tmp_path / "away" / "a" / "checkpoints").glob(".*"))
    assert not (tmp_path / "away" / "a" / METRICS).exists()  # of a run called first, and this one is not


def test_auto_fetches_what_the_disk_does_not_have(place, tmp_path):
    folder, url, config = place
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    home = url.removesuffix("/first")
    away = configuration(tmp_path / "away", run__name="first", run__remote=home, resume="auto")
    run = tmp_path / "away" / "first"
    assert source_of(away, run).bring().samples == 640
    assert (run / METRICS).read_bytes() == (folder / METRICS).read_bytes()
    assert source_of(away, run) is None  # it has it now
    write(tmp_path, 20, config)
    one._bring_up_to_date()
    assert source_of(away, run).bring().samples == 1280
    (run / "environment.json").write_text('{"time": "another", "host": "here"}')
    with pytest.raises(UserError, match=r"run.name: .*away/first holds another run than the one at memory://"):
        source_of(away.model_copy(update={"resume": url}), run).bring()
    other = configuration(tmp_path / "away", run__name="first", resume=url, optimizer__lr=0.5)
    with pytest.raises(UserError, match=r"resume: memory://.*/step_00000020 was made by another recipe"):
        source_of(other, run).look()
    with pytest.raises(UserError, match=r"resume: no checkpoint that can be used at memory://nowhere/x"):
        source_of(configuration(tmp_path, resume="memory://nowhere/x"), run).look()


def test_a_damaged_state_is_passed_over_too_and_what_no_run_uploads_is_not_fetched(place, tmp_path):
    _, url, config = place
    write(tmp_path, 20, config, number=2)
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    state = f"{one.remote._root}/checkpoints/{files.name_of(20)}/state.json"
    one.remote._files.pipe_file(
        state, one.remote._files.cat_file(state).replace(b'"samples": 1280', b'"samples": 1281')
    )
    for name in (".holder.json", ".lock", "a/.b/c", "weights.safetensors", "wandb/x"):
        one.remote._files.pipe_file(f"{one.remote._root}/{name}", b"of somebody else")
    away = configuration(tmp_path / "away", run__name="first", resume=url)
    run = tmp_path / "away" / "first"
    source = source_of(away, run)
    for found in (source.look()[0], source.bring()):
        assert found.samples == 640
        assert "step_00000020 is not used: state.json is damaged" in found.notes()[0]
    there = {
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and "checkpoints" not in path.parts
    }
    assert there == {"environment.json", METRICS}


def test_what_is_damaged_on_the_disk_is_fetched_where_the_store_has_it_whole(place, tmp_path):
    """And what the store then holds stays there."""
    _, url, config = place
    write(tmp_path, 20, config, number=2)
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    away = configuration(tmp_path / "away", run__name="first", run__remote=url.removesuffix("/first"), resume="auto")
    run = tmp_path / "away" / "first"
    kept = run / "checkpoints"
    source_of(away, run).bring()
    shutil.copytree(tmp_path / "a" / "checkpoints" / files.name_of(10), kept / files.name_of(10))
    assert source_of(away, run) is None
    for damaged in ([20], [20, 10]):
        for step in damaged:
            flipped(kept / files.name_of(step) / "rank_00000.safetensors")
        source = source_of(away, run)
        assert source.here == (None if 10 in damaged else kept / files.name_of(10))
        found, called = source.look()
        assert (found.samples, called) == (1280, f"{url}/checkpoints/step_00000020")
        found = source.bring()
        assert found.checkpoint == kept / files.name_of(20)
        assert files.fault(found.checkpoint) is None
        assert "step_00000020 is not used: rank_00000.safetensors is damaged" in found.complaints[0]
    after = mirror((run, url, config))
    after.claim()
    after._bring_up_to_date()
    assert list(RemoteRun(url, "resume").candidates([])) == [20, 10]


def test_the_disk_s_is_taken_where_the_newest_of_both_are_damaged(place, tmp_path):
    """An older one of the store is none to go back to."""
    folder, url, config = place
    home = url.removesuffix("/first")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "first").symlink_to(folder)
    config = configuration(tmp_path / "b", run__name="first", run__remote=home, resume="auto")
    write(tmp_path, 20, config, number=3)
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    write(tmp_path, 15, config, number=2)
    flipped(folder / "checkpoints" / files.name_of(20) / "rank_00000.safetensors")
    far = f"{one.remote._root}/checkpoints/{files.name_of(20)}/rank_00000.safetensors"
    one.remote._files.pipe_file(far, b"x" * one.remote._files.size(far))
    source = source_of(config, tmp_path / "b" / "first")
    assert (source.look()[0].samples, source.bring().samples) == (1280, 960)  # only reading all of it tells
    assert source.bring().checkpoint.name == files.name_of(15)


def test_a_damaged_manifest_takes_no_whole_checkpoint_s_place(place, tmp_path):
    folder, url, config = place
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    write(tmp_path, 20, config, number=2)
    flipped(folder / "checkpoints" / files.name_of(10) / files.MANIFEST)
    one._bring_up_to_date()
    assert list(RemoteRun(url, "resume").candidates([])) == [20, 10]


def test_a_disk_without_room_for_the_run_is_told_before_there_is_a_folder(place, tmp_path, monkeypatch):
    """Also when the disk fills up on the way, nothing half-fetched is left; a killed process's half counts as free."""
    _, url, _ = place
    one = mirror(place)
    one.claim()
    one._bring_up_to_date()
    away = configuration(tmp_path / "away", run__name="first", resume=url)
    run = tmp_path / "away" / "first"
    source = source_of(away, run)
    usage = partial(namedtuple("usage", "total free"), 2**40)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(900))
    with pytest.raises(UserError, match=r"^run.folder: expected .* bytes free in .*first/checkpoints for checkpoint"):
        source.look()
    assert not (tmp_path / "away").exists()
    begun = files.staging(run / "checkpoints", 10)
    begun.mkdir(parents=True)
    (begun / "rank_00000.safetensors").write_bytes(b"x" * 10_000)
    assert source.look()[0].samples == 640
    assert source.bring().samples == 640
    shutil.rmtree(run)

    def full(far, near, **how):
        Path(near).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(2**30))
    monkeypatch.setattr(source.remote._files, "get_file", full)
    with pytest.raises(UserError, match=r"^TMPDIR: the disk of /.* is full"):
        source.look()
    monkeypatch.setattr(Source, "_look", lambda *words: None)
    with pytest.raises(UserError, match=r"^run.folder: the disk of .*away/first is full \(No space left"):
        source.bring()
    assert not any(path.is_file() for path in run.rglob("*"))
    assert not (run / "checkpoints").exists()
