"""The same batches on any number of ranks and workers, from any step on."""

import itertools
import logging
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from amclr_scale.config import schema
from amclr_scale.data import index as index_module
from amclr_scale.data.formats.members import Members
from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_shards, write_tar

ROOT = Path(__file__).parents[2]
CLASSES = ["dog", "dog", 3, "3", [1, 2], [1, 2], None, None]
AUGMENTED = {"image_views": 1, "text_views": 1}


def take(data, steps, **options):
    loader = TrainLoader(data, **{"seed": 0, "global_batch_size": 8, **options})
    try:
        return [next(loader) for _ in range(steps)]
    finally:
        loader.close()


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.ids, b.ids, rtol=0, atol=0)
        for x, y in zip([*a.images, *a.texts], [*b.images, *b.texts], strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        torch.testing.assert_close(a.given, b.given, rtol=0, atol=0)


def joined(per_rank):
    """Global batches out of what every rank got."""
    steps = []
    for batches in zip(*per_rank, strict=True):
        first = batches[0]
        steps.append(
            type(first)(
                torch.cat([b.ids for b in batches]),
                tuple(torch.cat([b.images[v] for b in batches]) for v in range(len(first.images))),
                tuple(torch.cat([b.texts[v] for b in batches]) for v in range(len(first.texts))),
                given={name: torch.cat([b.given[name] for b in batches]) for name in first.given},
            )
        )
    return steps


def test_shapes_and_types():
    data = schema.Data(image_size=24, context_length=20, **AUGMENTED)
    batch = take(data, 1, global_batch_size=16)[0]
    assert batch.ids.dtype == torch.int64
    assert [tuple(image.shape) for image in batch.images] == [(16, 3, 24, 24)] * 2
    assert [tuple(text.shape) for text in batch.texts] == [(16, 20)] * 2
    assert {image.dtype for image in batch.images} == {torch.uint8}
    assert (batch.images[0] != batch.images[1]).any(dim=(1, 2, 3)).all()
    assert (batch.texts[0] != batch.texts[1]).any(dim=1).all()


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.launch
def test_global_batches_do_not_depend_on_ranks_and_workers(workers):
    """Ids, pixels after augmentation, tokens; on the real corpus."""
    data = schema.Data(image_size=16, context_length=20, lanes=4, augmentation={"randaugment": [1, 9]}, **AUGMENTED)
    options = {"global_batch_size": 160, "workers": workers}  # parts of 64: not all alike
    one = take(data, 2, global_batch_size=160)
    for world_size in (1, 2, 4):
        per_rank = [take(data, 2, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
        assert_same(joined(per_rank), one)


@pytest.mark.parametrize("sizes", [[1, 0, 7, 3], [40], [1] * 9])
def test_every_sample_comes_once_per_epoch(tmp_path, sizes):
    write_shards(tmp_path, sizes)
    n = sum(sizes)
    seen = torch.cat([batch.ids for batch in take(settings(str(tmp_path)), n, global_batch_size=4)])
    counts = torch.bincount(seen, minlength=n)
    assert len(seen) == 4 * n  # four epochs
    assert counts.tolist() == [4] * n


def test_pictures_and_captions_stay_together(tmp_path):
    write_shards(tmp_path, [30, 30])
    data = settings(str(tmp_path))
    loader = TrainLoader(data, seed=0, global_batch_size=12)
    for _ in range(10):
        batch = next(loader)
        assert batch.images[0][:, 0, 0, 0].tolist() == batch.ids.tolist()  # the red of picture i is i
        expected = loader.tokenizer([f"sample {i}" for i in batch.ids.tolist()])
        torch.testing.assert_close(batch.texts[0], expected, rtol=0, atol=0)


@pytest.mark.launch
def test_twenty_interruptions(tmp_path):
    """Killed anywhere, resumed on another number of ranks and workers: the rest is what it would have been."""
    write_shards(tmp_path, [17, 1, 29, 0, 8])  # 55 samples, 7 steps of 8 an epoch: some steps cross into the next
    data = settings(str(tmp_path), **AUGMENTED)
    whole = take(data, 40)
    choose = random.Random(0)
    for _ in range(20):
        step, world_size, workers = choose.randrange(37), choose.choice([1, 2, 4]), choose.choice([0, 0, 1, 2])
        per_rank = [
            take(data, 3, rank=rank, world_size=world_size, workers=workers, start_step=step)
            for rank in range(world_size)
        ]
        assert_same(joined(per_rank), whole[step : step + 3])


def test_a_view_depends_on_its_seed_pass_id_and_number_only(tmp_path):
    """The same visits in other company: another number of lanes changes the order, never a sample's views."""
    write_shards(tmp_path, [24])

    def by_id(lanes):
        batches = take(settings(str(tmp_path), lanes=lanes, **AUGMENTED), 3)
        return {
            int(i): [view[k] for view in (*batch.images, *batch.texts)]
            for batch in batches
            for k, i in enumerate(batch.ids)
        }

    first, second = by_id(2), by_id(8)
    assert first.keys() == second.keys() == set(range(24))
    for i, views in first.items():
        for a, b in zip(views, second[i], strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_seeds_and_epochs_give_other_views(tmp_path):
    write_shards(tmp_path, [40])
    data = settings(str(tmp_path), image_size=12)

    def by_id(batches):
        return {int(i): batch.images[0][k] for batch in batches for k, i in enumerate(batch.ids)}

    first, other = by_id(take(data, 5)), by_id(take(data, 5, seed=1))
    second = by_id(take(data, 5, start_step=5))
    assert sum(not torch.equal(first[i], other[i]) for i in first) > 30
    assert sum(not torch.equal(first[i], second[i]) for i in first) > 30


@pytest.mark.launch
def test_large_local_batches_are_shared_by_all_workers():
    data = schema.Data(image_size=16, context_length=12, lanes=2)
    loader = TrainLoader(data, seed=0, global_batch_size=600, workers=2)
    batch = next(loader)
    assert len(batch) == 600
    assert len(set(batch.ids.tolist())) == 600
    loader.close()


# Mistakes


def test_more_ranks_than_lanes_is_told():
    with pytest.raises(UserError, match=r"data\.lanes: expected a multiple of the 3 ranks, got 8"):
        TrainLoader(schema.Data(), seed=0, global_batch_size=24, world_size=3)


def test_a_batch_that_lanes_do_not_divide_is_told():
    with pytest.raises(UserError, match=r"train\.global_batch_size: expected a multiple of data\.lanes = 8, got 20"):
        TrainLoader(schema.Data(), seed=0, global_batch_size=20)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_vanishes_is_told_and_does_not_hang(tmp_path, workers):
    urls = write_shards(tmp_path, [20, 20])
    loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8, workers=workers)
    for url in urls:
        open(url, "wb").close()
    with pytest.raises(UserError, match="has changed since it was indexed"):
        list(itertools.islice(loader, 10))
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_of_ours_in_a_worker_keeps_its_place(tmp_path, workers):
    """What is not the user's mistake ends with the traceback of the worker."""
    before = set(multiprocessing.active_children())
    write_shards(tmp_path, [20, 20])
    loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8, workers=workers)
    loader._parts.pipeline.tokenizer = None
    with pytest.raises(TypeError, match="NoneType"):
        next(loader)
    loader.close()
    assert set(multiprocessing.active_children()) <= before  # at once, though the error's traceback still holds them


OF_OURS = """
import sys
from amclr_scale.data.loader import TrainLoader
from tests.data.shards import settings
loader = TrainLoader(settings(sys.argv[1]), seed=0, global_batch_size=8, workers=2)
loader._parts.pipeline.tokenizer = None
next(loader)
"""


@pytest.mark.launch
def test_an_error_of_ours_in_a_worker_ends_the_process(tmp_path):
    write_shards(tmp_path, [20, 20])
    done = subprocess.run(
        [sys.executable, "-c", OF_OURS, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert "TypeError: 'NoneType' object is not callable" in done.stderr


def test_logs_name_the_process_that_indexes(tmp_path, caplog):
    write_shards(tmp_path, [20])
    with caplog.at_level(logging.WARNING):
        take(settings(str(tmp_path)), 1)
        take(settings(str(tmp_path)), 1)
    assert sum("has no index" in record.message for record in caplog.records) == 1


def test_labels_agree_where_values_do(tmp_path):
    members = [m for i, value in enumerate(CLASSES) for m in pair(i, **({} if value is None else {"class": value}))]
    write_tar(tmp_path / "0.tar", members)
    for workers in (0, 2):
        loader = TrainLoader(
            settings(str(tmp_path), labels="json.class", lanes=1), seed=0, global_batch_size=8, workers=workers
        )
        batch = next(loader)
        labels = torch.empty(8, dtype=torch.int64)
        labels[batch.ids] = batch.beside()["labels"]
        loader.close()
        found = labels[:, None] == labels
        assert found.tolist() == [[a == b and type(a) is type(b) for b in CLASSES] for a in CLASSES]
        assert (labels < 0).tolist() == [value is None for value in CLASSES]
    assert "labels" not in next(TrainLoader(settings(str(tmp_path), lanes=1), seed=0, global_batch_size=8)).beside()


def test_a_place_without_classes_is_refused(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i in range(4) for m in pair(i)])
    with pytest.raises(
        UserError, match=r"^data\.labels: expected a place where samples say their class, got json\.klass"
    ):
        TrainLoader(settings(str(tmp_path), labels="json.klass", lanes=1), seed=0, global_batch_size=4)


def test_a_rank_of_many_lanes_keeps_their_shards_open(tmp_path, monkeypatch):
    """Each shard is opened once while its window lasts, however many lanes take turns; but not more than is allowed."""
    monkeypatch.setattr(index_module, "_OPEN_SHARDS", 2)
    write_shards(tmp_path, [10] * 12)
    for most, opened in ((1024, 12), (3, 30)):
        monkeypatch.setattr(index_module, "_MOST_OPEN", most)
        with mock.patch.object(Members, "load", side_effect=Members.load) as load:
            loader = TrainLoader(settings(str(tmp_path)), seed=0, global_batch_size=8)
            load.reset_mock()
            for _ in range(9):  # of 15 steps
                next(loader)
            loader.close()
        assert load.call_count <= opened if most > 100 else load.call_count >= opened
