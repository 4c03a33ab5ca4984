"""IndexedShards as the first stage of webdataset's own pipelines."""

import io
import itertools

import pytest
import torch
import webdataset as wds
from PIL import Image

from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.webdataset import IndexedShards
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar

ORDER = {"global_batch_size": 8, "lanes": 4, "shuffle_window": 2, "seed": 5}


def red(picture):
    return torch.tensor(picture.getpixel((0, 0))[0])


def loader_of(source, workers=0):
    """Decoded, mapped and batched by webdataset; items of (first red value, caption, id)."""
    stages = [wds.decode("pil"), wds.to_tuple("png", "txt", "__id__"), wds.map_tuple(red), wds.batched(source.per_item)]
    return wds.WebLoader(wds.DataPipeline(source, *stages), batch_size=None, num_workers=workers)


def take(source, items, workers=0):
    return list(itertools.islice(source.follow(loader_of(source, workers)), items))


def ids_of(items):
    return [int(i) for item in items for i in item[2]]


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path / "data", [5, 9, 1, 8, 7])


@pytest.mark.launch
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("world_size", [1, 2])
def test_batches_are_those_of_training(shards, world_size, workers):
    """Over an epoch's end, with the pictures and captions that belong to the ids."""
    steps, own = 6, {"world_size": world_size}
    for rank in range(world_size):
        trained = TrainLoader(settings(shards), seed=5, global_batch_size=8, rank=rank, **own)
        expected = [i for _ in range(steps) for i in next(trained).ids.tolist()]
        source = IndexedShards(shards, **ORDER, per_item=2, rank=rank, **own)
        items = take(source, steps * 4 // world_size, workers)
        assert ids_of(items) == expected
        for reds, captions, ids in items:
            assert list(captions) == [f"sample {i}" for i in ids]
            assert [int(value) for value in reds] == [int(i) for i in ids]


@pytest.mark.launch
def test_goes_on_where_it_was_with_other_workers_and_ranks(shards):
    """What workers had made ahead of their consumer is not lost."""
    whole = ids_of(take(IndexedShards(shards, **ORDER), 48))
    source = IndexedShards(shards, **ORDER, per_item=4)
    assert ids_of(take(source, 3, workers=2)) == whole[:12]
    resumed = IndexedShards(shards, **ORDER, per_item=2)
    resumed.load_state_dict(source.state_dict())
    assert resumed.samples == 12
    first = ids_of(take(resumed, 2, workers=1))
    assert first == whole[12:16]
    assert ids_of(take(resumed, 4)) == whole[16:24]  # another loader of the same source
    halves = list[list[int]]()
    for rank in range(2):
        half = IndexedShards(shards, **ORDER, rank=rank, world_size=2)
        half.load_state_dict(resumed.state_dict())
        halves.append(ids_of(take(half, 12)))
        assert half.samples == 48  # of both together
    assert [i for at in (0, 4, 8) for half in halves for i in half[at : at + 4]] == whole[24:48]


def test_a_mixture_is_that_of_training(tmp_path):
    """Over two epochs' ends: half of the first data set and three times the second one in each."""
    write_shards(tmp_path / "a", [8, 8])
    write_shards(tmp_path / "b", [8], first=16)
    names, weights = [str(tmp_path / name) for name in ("a", "b")], [0.5, 3.0]
    for rank in range(2):
        place = {"rank": rank, "world_size": 2}
        trained = TrainLoader(settings(names, weights=weights), seed=5, global_batch_size=8, **place)
        source = IndexedShards(names, **ORDER, weights=weights, **place)
        assert source.samples_per_epoch == trained.samples_per_epoch == 8 + 24
        found = [(sample["__id__"], sample["__pass__"]) for sample in itertools.islice(source, 40)]
        assert [i for i, _ in found] == [i for _ in range(10) for i in next(trained).ids.tolist()]
        assert len(set(found)) == 40  # no visit twice


def test_samples_are_webdatasets_own_and_two_keys_more(tmp_path):
    (url,) = write_shards(tmp_path, [6])
    theirs = {sample["__key__"]: sample for sample in wds.WebDataset(url, shardshuffle=False)}
    source = IndexedShards(url, global_batch_size=2, lanes=2)
    for ours in itertools.islice(source, 6):
        expected = theirs[ours["__key__"]]
        assert {name: ours[name] for name in expected if name != "__local_path__"} == {
            name: value for name, value in expected.items() if name != "__local_path__"
        }
        assert set(ours) - set(expected) == {"__id__", "__pass__"}
        assert ours["__pass__"] == 0
    assert next(itertools.islice(source, 6, 7))["__pass__"] == 1


def test_no_pictures_are_asked_for(tmp_path):
    write_tar(tmp_path / "a.tar", [(f"{i}.wav", bytes([i])) for i in range(4)])
    source = IndexedShards(str(tmp_path), global_batch_size=4, lanes=1)
    assert sorted(sample["wav"] for sample in itertools.islice(source, 4)) == [b"\0", b"\1", b"\2", b"\3"]


def test_unreadable_samples_are_replaced_as_in_training(tmp_path, caplog):
    """A key that comes twice: the same other sample in its place, counted and said."""
    members = [member for i in (0, 1, 2, 1, 3) for member in pair(i)]
    write_tar(tmp_path / "a.tar", members)
    trained = TrainLoader(settings(str(tmp_path), max_bad_fraction=1.0), seed=5, global_batch_size=4)
    expected = [next(trained).ids.tolist() for _ in range(5)]
    source = IndexedShards(str(tmp_path), **ORDER | {"global_batch_size": 4})
    found = [[next(samples)["__id__"] for _ in range(4)] for samples in [iter(source)] for _ in range(5)]
    assert found == expected
    assert source.counts["duplicate key"] > 0
    assert "duplicate key" in caplog.text


def test_place_is_that_of_the_launcher(shards, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    source = IndexedShards(shards, **ORDER)
    assert (source.rank, source.world_size, source.local_batch_size) == (1, 2, 4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"rank": 1}, "rank, world_size: expected both"),
        ({"rank": 2, "world_size": 2}, "rank: expected a number from 0 on below world_size = 2, got 2"),
        ({"rank": -1, "world_size": 2}, "rank: expected a number from 0 on below world_size = 2, got -1"),
        ({"rank": 0, "world_size": 0}, "rank: expected a number from 0 on below world_size = 0, got 0"),
        ({"rank": 0, "world_size": 3}, "lanes: expected a multiple of the 3 ranks, got 4"),
        ({"global_batch_size": 6}, "global_batch_size: expected a multiple of lanes = 4, got 6"),
        ({"per_item": 3}, "per_item: expected a divisor of a rank's 8 samples"),
        ({"lanes": 0}, "lanes: .*got 0"),
        ({"weights": [1.0, 2.0]}, "weights"),
    ],
)
def test_bad_numbers(shards, keys, words):
    with pytest.raises(UserError, match=words):
        IndexedShards(shards, **ORDER | keys)


def test_positions_of_other_data_and_orders_are_refused(tmp_path, shards):
    state = IndexedShards(shards, **ORDER, per_item=2).state_dict() | {"samples": 4}
    with pytest.raises(UserError, match="seed: expected 5"):
        IndexedShards(shards, **ORDER | {"seed": 6}).load_state_dict(state)
    other = write_shards(tmp_path / "other", [30])
    with pytest.raises(UserError, match="fingerprint: expected"):
        IndexedShards(other, **ORDER).load_state_dict(state)
    with pytest.raises(UserError, match="between batches of 8 to go on from 1 ranks to 2, got 4"):
        IndexedShards(shards, **ORDER, rank=0, world_size=2).load_state_dict(state)
    with pytest.raises(UserError, match="samples: expected a multiple of 8 per item"):
        IndexedShards(shards, **ORDER, per_item=8).load_state_dict(state)


def test_pictures_can_be_decoded_by_hand(shards):
    sample = next(iter(IndexedShards(shards, **ORDER)))
    assert Image.open(io.BytesIO(sample["png"])).size == (12, 10)
