"""The binary form of an index is the JSON form, bit for bit; of it, a process reads what it needs."""

import os
import pickle
import tarfile
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch

from amclr_scale.commands import index_shards
from amclr_scale.data import indexing
from amclr_scale.data.formats.members import ChangedShardError
from amclr_scale.data.indexes.binary import BLOCK, MANY, BinaryShards, write_binary_index
from amclr_scale.data.indexes.entries import Shard
from amclr_scale.data.indexing import open_index, share_of
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar


@pytest.fixture
def both(tmp_path):
    """Indexes in both forms of the same shards: plain, empty, gzipped, cut off."""
    folder = tmp_path / "shards"
    write_shards(folder, [10, 7, 0, 12])
    write_tar(folder / "00004.tar.gz", [member for i in range(5) for member in pair(50 + i)], "w:gz")
    cut = write_tar(
        folder / "00005.tar", [member for i in range(6) for member in pair(60 + i)], form=tarfile.PAX_FORMAT
    )
    cut.write_bytes(cut.read_bytes()[: -3 * 10240 // 4])
    names = [str(tmp_path / name) for name in ("own.json", "own.bin")]
    for name in names:
        assert index_shards.main([str(folder), "--out", name, "--cache", str(tmp_path / "cache")]) == 0
    return names


def batches(train, steps, start=0):
    loader = TrainLoader(settings(train, max_bad_fraction=1.0), seed=3, global_batch_size=8, start_step=start)
    found = [next(loader) for _ in range(steps)]
    loader.close()
    return found


def test_the_same_shards_ids_and_fingerprints(both):
    one, other = (open_index(settings(name)) for name in both)
    assert list(one.shards) == list(other.shards)
    assert np.array_equal(one.first_id, other.first_id)
    assert one.fingerprint == other.fingerprint
    assert one.shards.content() == other.shards.content()
    assert [shard.url for shard in one.shards.damaged()] == [shard.url for shard in other.shards.damaged()] != []
    for start, stop in ((0, 3), (2, 6), (1, 1)):
        assert one.fingerprint_of(slice(start, stop)) == other.fingerprint_of(slice(start, stop))
    assert np.array_equal(one.shards.remote, other.shards.remote)
    assert np.array_equal(one.shards.file_sizes, other.shards.file_sizes)


def test_the_same_batches_from_any_step(both):
    one, other = (batches(name, 9) for name in both)
    for a, b in zip([*one, *one[6:]], [*other, *batches(both[1], 3, start=6)], strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.images[0], b.images[0])
        assert torch.equal(a.texts[0], b.texts[0])


def test_several_data_sets_in_different_forms(both):
    json, binary = both
    mixed, plain = open_index(settings([binary, json])), open_index(settings([json, json]))
    assert mixed.parts == plain.parts == [6, 6]
    assert mixed.fingerprint == plain.fingerprint
    assert mixed.fingerprint_of(slice(0, 6)) == open_index(settings(json)).fingerprint
    assert mixed.shards.content() == plain.shards.content()
    for sample in range(0, plain.num_samples, 3):
        assert mixed.locate(sample) == plain.locate(sample)
        assert mixed.part_of(sample) == plain.part_of(sample)
        shard, row = mixed.locate(sample)
        assert mixed.reader(shard).read(row, frozenset(("txt",))) == plain.reader(shard).read(row, frozenset(("txt",)))


def test_another_process_opens_it_itself(both):
    shards = open_index(settings(both[1])).shards
    sent = pickle.dumps(shards)
    assert len(sent) < 1000
    assert list(pickle.loads(sent)) == list(shards)
    write_binary_index(shards.path, list(shards)[::-1])
    with pytest.raises(UserError, match="expected the index that this run began with, got another one"):
        pickle.loads(sent)
    assert len(shards) == 6  # whoever has opened it goes on


def test_the_form_follows_from_the_number_of_shards_or_the_name(tmp_path, capsys):
    assert [index_shards.index_name(n) for n in (1, MANY, MANY + 1)] == ["index.json", "index.json", "index.bin"]
    write_shards(tmp_path, [3, 4])
    assert index_shards.main([str(tmp_path), "--out", str(tmp_path / "index.txt")]) == 2
    assert index_shards.main([str(tmp_path), "--out", str(tmp_path / "index.bin")]) == 0
    binary = open_index(settings(str(tmp_path)))
    assert isinstance(binary.shards, BinaryShards)
    assert index_shards.main([str(tmp_path)]) == 0
    assert "index.bin is there too" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"expected one index, found index.json and index.bin"):
        open_index(settings(str(tmp_path)))
    assert open_index(settings(str(tmp_path / "index.json"))).fingerprint == binary.fingerprint


@pytest.fixture
def many(tmp_path):
    """Twenty blocks of shards that share one member table and lie elsewhere; the last one has other members."""
    write_shards(tmp_path, [10])
    assert index_shards.main([str(tmp_path)]) == 0
    (one,) = open_index(settings(str(tmp_path))).shards
    shards = [replace(one, url=f"https://host/{i:05d}.tar", num_samples=10) for i in range(20 * BLOCK)]
    shards[-1] = replace(shards[-1], extensions={**one.extensions, "npy": 3})
    write_binary_index(tmp_path / "many.bin", shards)
    return tmp_path / "many.bin", shards


def test_a_process_reads_the_blocks_that_it_needs(many):
    path, shards = many
    with mock.patch.object(BinaryShards, "_parsed", autospec=True, side_effect=BinaryShards._parsed) as parsed:
        index = open_index(settings(str(path)), share=(3, 10_000))
        assert {call.args[1] for call in parsed.mock_calls} <= {0, 19}  # one shard of each kind, and the largest
        parsed.reset_mock()
        assert index.fingerprint
        assert index.shards.content()
        assert index.shards.remote.all()
        shard, _ = index.locate(700 * 10 + 4)
        assert index.shards[shard] == shards[700]
        assert index.shards[shard + 1] == shards[701]
        assert [call.args[1] for call in parsed.mock_calls] == [700 // BLOCK]
        list(index.shards)
        assert len(index.shards._blocks) < 8


def test_members_that_some_shards_lack_are_found(tmp_path):
    write_shards(tmp_path, [4])
    assert index_shards.main([str(tmp_path)]) == 0
    (one,) = open_index(settings(str(tmp_path))).shards
    shards = [one] * 300
    shards[222] = replace(one, url="https://host/222.tar", extensions={"png": 4, "json": 4})
    write_binary_index(tmp_path / "many.bin", shards)
    with pytest.raises(UserError, match=r"https://host/222.tar: expected captions in .txt members"):
        open_index(settings(str(tmp_path / "many.bin")))


@pytest.mark.parametrize("form", ["json", "bin"])
def test_ranks_share_out_the_files_of_very_many_shards(tmp_path, form):
    write_shards(tmp_path, [2] * 12)
    assert index_shards.main([str(tmp_path), "--out", str(tmp_path / f"index.{form}")]) == 0
    looked, stat = [], os.stat
    with (
        mock.patch.object(indexing, "MANY", 5),
        mock.patch("os.stat", lambda path, **k: looked.append(path) or stat(path, **k)),
    ):
        for rank in range(4):
            open_index(settings(str(tmp_path)), share=(rank, 4))
            assert len([path for path in looked if str(path).endswith(".tar")]) == 3 * (rank + 1)
    assert len({path for path in looked if str(path).endswith(".tar")}) == 12
    assert share_of(MANY, (3, 8)) == range(MANY)  # not so many: everybody looks at all
    # What a rank has not looked at, it finds when it opens the shard.
    with (tmp_path / "00011.tar").open("ab") as file:
        file.write(bytes(512))
    with mock.patch.object(indexing, "MANY", 5):
        index = open_index(settings(str(tmp_path)), share=(0, 4))
    index.reader(0)
    with pytest.raises(ChangedShardError, match=r"00011.tar: expected .* bytes \(from the index\)"):
        index.reader(11)


def test_a_shard_that_does_not_fit_the_form_is_told(tmp_path):
    shard = Shard("https://host/0.tar", 1, tmp_path / "0.npz", "no sha256", {"png": 1, "txt": 1})
    with pytest.raises(UserError, match=r"its digest is no sha256, 'no sha256'; write an index.json"):
        write_binary_index(tmp_path / "own.bin", [shard])
    with pytest.raises(UserError, match=r"takes .* bytes, more than .*; write an index.json"):
        write_binary_index(tmp_path / "own.bin", [replace(shard, digest="0" * 64, damage=("x" * (1 << 20),))])
    assert not (tmp_path / "own.bin").exists()
