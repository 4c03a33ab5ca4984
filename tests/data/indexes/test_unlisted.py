"""Shards that lie in a folder beside an index without them are never left out without a word."""

import json
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from amclr_scale.commands import index_shards
from amclr_scale.data import sources
from amclr_scale.data.indexing import UnlistedShardsError, open_index
from amclr_scale.data.loader import TrainLoader
from tests.data.shards import settings, write_shards


@pytest.fixture(params=["index.json", "index.bin"])
def grown(tmp_path, request):
    """A folder with an index of two shards of three."""
    write_shards(tmp_path / "F", [3, 2])
    assert index_shards.main([str(tmp_path / "F"), "--out", str(tmp_path / "F" / request.param)]) == 0
    shutil.copy(tmp_path / "F/00000.tar", tmp_path / "F/3.tar")
    return tmp_path / "F" / request.param


def test_a_shard_that_came_after_the_index_is_refused(grown):
    with pytest.raises(UnlistedShardsError) as told:
        open_index(settings(str(grown.parent)), key="evaluation.splits")
    assert str(told.value) == (
        f"evaluation.splits: {grown.parent}: expected every shard of the folder in its {grown.name}, got 1 that is not "
        f"(3.tar); run amclr-scale shards index {grown.parent}, after which samples may have other ids, move what is "
        f"not meant out of the folder, or name {grown} instead of the folder"
    )
    assert open_index(settings(str(grown))).num_samples == 5
    assert index_shards.main([str(grown.parent), "--out", str(grown)]) == 0
    assert open_index(settings(str(grown.parent))).num_samples == 8


def test_of_several_ranks_one_looks_once(grown):
    """Others may see a shard that came a moment later, and a listing may be slow."""
    with mock.patch.object(Path, "iterdir", autospec=True, side_effect=Path.iterdir) as listed:
        assert open_index(settings(str(grown))).num_samples == 5
        assert open_index(settings(str(grown.parent)), share=(1, 2)).num_samples == 5
        assert listed.call_count == 0
        (grown.parent / "3.tar").unlink()
        open_index(settings(str(grown.parent)), share=(0, 2))
        assert listed.call_count == 1


def test_a_run_that_goes_on_is_told_and_not_ended(grown, caplog):
    loader = TrainLoader(settings(str(grown.parent)), seed=0, global_batch_size=4, start_step=1)
    assert loader.num_samples == 5
    assert caplog.messages == [f"data.train: {grown} does not name 3.tar: this run goes on with what it began with"]
    with pytest.raises(UnlistedShardsError):
        TrainLoader(settings(str(grown.parent)), seed=0, global_batch_size=4)


@pytest.mark.parametrize(
    ("urls", "left"),
    [
        (["0.tar", "1.tar", "a/2.tar"], ["2.tar"]),  # that of a subfolder is another one
        (["./0.tar", "a/../1.tar", "2.tar"], []),
        (["https://host/0.tar?key=1", "s3://bucket/1.tar", "2.tar"], []),  # copies of what a store has
        (["/moved/from/0.tar", "1.tar"], ["2.tar"]),
        (["0.tar", "1.tar", "2.tar", "gone.tar"], []),
        ([], ["0.tar", "1.tar", "2.tar"]),
    ],
)
def test_which_shards_an_index_stands_for(tmp_path, monkeypatch, urls, left):
    write_shards(tmp_path, [1])
    for name in ("0.tar", "1.tar", "2.tar", "._0.tar"):  # the last is macOS's, beside what it copies
        shutil.copy(tmp_path / "00000.tar", tmp_path / name)
    (tmp_path / "00000.tar").unlink()
    for name in ("notes.txt", "3.tar.part", "members"):
        (tmp_path / name).touch()
    assert sources.unlisted(tmp_path, urls) == left
    monkeypatch.chdir(tmp_path)
    assert sources.unlisted(Path(), urls) == left


def test_an_index_elsewhere_and_a_folder_below_are_no_concern(tmp_path):
    write_shards(tmp_path / "F", [3, 2])
    write_shards(tmp_path / "F/below", [1])
    (tmp_path / "list").mkdir()
    assert index_shards.main([f"{tmp_path}/F/00000.tar", "--out", f"{tmp_path}/list/index.json"]) == 0
    assert index_shards.main([f"{tmp_path}/F"]) == 0
    assert json.loads((tmp_path / "list/index.json").read_text())["shardlist"][0]["url"].startswith(os.sep)
    assert [open_index(settings(f"{tmp_path}/{name}")).num_samples for name in ("F", "list")] == [5, 3]
