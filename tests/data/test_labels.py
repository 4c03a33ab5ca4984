"""Classes of samples, for objectives that read them."""

import pytest
import torch

from amclr_scale.data.loader import TrainLoader
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_tar

CLASSES = ["dog", "dog", 3, "3", [1, 2], [1, 2], None, None]


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
