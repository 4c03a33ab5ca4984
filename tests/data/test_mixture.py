"""Several data sets with weights: each sample as often as its data set weighs, whatever the number of ranks."""

from collections import Counter

import pytest
import torch

from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import settings, write_shards
from tests.data.test_loader import assert_same, joined, take


@pytest.fixture
def mixed(tmp_path):
    write_shards(tmp_path / "a", [8, 8])
    write_shards(tmp_path / "b", [8], first=16)
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def test_weights_are_passes_per_epoch(mixed):
    loader = TrainLoader(settings(mixed, weights=[0.5, 3]), seed=0, global_batch_size=8)
    assert loader.num_samples == 24
    assert loader.samples_per_epoch == 8 + 24
    seen = torch.cat([next(loader).ids for _ in range(16)])  # four epochs
    counts = Counter(seen.tolist())
    assert {counts[i] for i in range(16)} == {2}
    assert {counts[i] for i in range(16, 24)} == {12}


def test_each_pass_has_its_own_views(mixed):
    loader = TrainLoader(settings(mixed, weights=[0.5, 3], image_size=12), seed=0, global_batch_size=8)
    views = {}
    for _ in range(4):
        batch = next(loader)
        for i, image in zip(batch.ids.tolist(), batch.images[0], strict=True):
            views.setdefault(i, []).append(image)
    different = [not torch.equal(v[0], v[1]) for v in views.values() if len(v) == 3]
    assert len(different) == 8
    assert sum(different) >= 6


def test_the_mixture_does_not_depend_on_ranks(mixed):
    data = settings(mixed, weights=[0.7, 1.5])
    one = take(data, 20)
    for world_size in (2, 4):
        assert_same(joined([take(data, 20, rank=r, world_size=world_size) for r in range(world_size)]), one)
    assert_same(take(data, 5, start_step=11), one[11:16])


def test_without_weights_a_list_is_one_data_set(tmp_path):
    urls = write_shards(tmp_path, [5, 6, 7])
    assert_same(take(settings(urls), 8), take(settings(str(tmp_path)), 8))


def test_a_weight_too_many_is_told(mixed):
    with pytest.raises(
        UserError, match=r"data\.weights: expected one number for each of the 2 names in data\.train, got 3"
    ):
        TrainLoader(settings(mixed, weights=[1, 1, 1]), seed=0, global_batch_size=8)
