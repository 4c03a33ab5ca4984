"""`fit --verify` runs batches that are larger than what the recipe is to see."""

from amclr_scale.commands.rehearse import rehearse
from amclr_scale.config.load import build


def test_a_batch_larger_than_all_samples_of_the_recipe_is_rehearsed():
    config = build({"train": {"global_batch_size": 64, "samples": 64}, "model": {"embedding_width": 16}})
    train = config.train.model_copy(update={"global_batch_size": 128})
    found, failure = rehearse(config.model_copy(update={"train": train}), 1, 2**33)
    assert not failure
    assert found["peak_bytes"] > 0
