"""The loader's memory does not grow with the epochs."""

import gc

import psutil
import pytest

from amclr_scale.data.loader import TrainLoader
from tests.data.shards import settings, write_shards


@pytest.mark.slow
def test_fifty_epochs_in_flat_memory(tmp_path):
    write_shards(tmp_path, [10, 20, 10, 0, 20, 20])
    data = settings(str(tmp_path), image_size=16, image_views=1, text_views=1)
    loader = TrainLoader(data, seed=0, global_batch_size=20)
    process = psutil.Process()
    resident = []
    for epoch in range(50):
        for _ in range(4):
            next(loader)
        if epoch % 10 == 9:
            gc.collect()
            resident.append(process.memory_info().rss / 2**20)
    assert max(resident) - resident[0] < 3, resident
