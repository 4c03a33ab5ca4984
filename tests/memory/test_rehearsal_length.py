"""`fit --verify` runs batches that are larger than what the recipe is to see."""

import pytest

from amclr_scale.commands.rehearse import rehearse
from amclr_scale.config.load import build


@pytest.mark.parametrize("length", [{"samples": 64}, {"epochs": 0.01}])
def test_a_batch_larger_than_all_samples_of_the_recipe_is_rehearsed(length):
    config = build({"train": {"global_batch_size": 64, **length}, "model": {"embedding_width": 16}})
    train = config.train.model_copy(update={"global_batch_size": 128})
    found, failure = rehearse(config.model_copy(update={"train": train}), 1, 2**33)
    assert not failure
    assert found["peak_bytes"] > 0
