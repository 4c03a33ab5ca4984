"""Wrong pictures come with their samples, are the same on any number of ranks, and say where there are none."""

import pytest
import torch

from amclr_scale.config.load import load
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cost import encoder_cost
from tests.data.shards import pair, picture, settings, write_tar
from tests.data.test_loader import take

NAMED = ["neg.png", "near.jpg"]


def shards(folder) -> str:
    """Of four samples one has no wrong picture, one has one, two have two; of one colour each, which says whose."""
    members = []
    for i in range(16):
        wrong = [
            (f"{i:06d}.{name}", picture(128 + i + 32 * k, kind=("PNG", "JPEG")[k])) for k, name in enumerate(NAMED)
        ]
        members += pair(i) + wrong[: min(i % 4, 2)]
    return str(write_tar(folder / "0.tar", members))


def test_they_come_with_their_samples_on_any_number_of_ranks_and_workers(tmp_path):
    data = settings(shards(tmp_path), image_negatives=2, image_views=1, image_negative=NAMED)
    loader = TrainLoader(data, seed=0, global_batch_size=8)
    whole = [next(loader) for _ in range(3)]
    masks = torch.cat([batch.given["image_negative_mask"] for batch in whole])
    assert loader.repeated()["missing_image_negatives"] == (~masks).double().mean()
    loader.close()
    for batch in whole:
        assert len(batch.images) == 4
        mask = batch.given["image_negative_mask"]
        assert mask.dtype == torch.bool
        for row, i in enumerate(batch.ids.tolist()):
            assert mask[row].sum() == min(i % 4, 2)
            reds = [int(view[row, 0].float().mean().round()) for view in batch.images[2:]]
            of_it = {128 + i, 160 + i}
            for red, there in zip(reds, mask[row].tolist(), strict=True):
                near = min(of_it, key=lambda value, red=red: abs(value - red))
                assert abs(near - red) <= 3 if there else red == 0
                of_it -= {near} if there else set()
    halves = zip(take(data, 3, rank=0, world_size=2, workers=1), take(data, 3, rank=1, world_size=2), strict=True)
    for batch, parts in zip(whole, halves, strict=True):
        for ours, theirs in zip(batch.images, zip(*(p.images for p in parts), strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs))
        found = torch.cat([p.given["image_negative_mask"] for p in parts])
        assert torch.equal(batch.given["image_negative_mask"], found)


def test_one_that_is_damaged_makes_its_sample_unusable(tmp_path):
    members = [member for i in range(8) for member in [*pair(i), (f"{i:06d}.neg.png", picture(i + 100))]]
    members[-1] = ("000007.neg.png", b"no picture")
    data = settings(str(write_tar(tmp_path / "0.tar", members)), image_negatives=1, max_bad_fraction=1.0)
    loader = TrainLoader(data, seed=0, global_batch_size=8)
    assert 7 not in next(loader).ids.tolist()
    assert loader.counts.total() == 1
    loader.close()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"^data\.image_negative: expected members with further pictures"):
        take(settings(shards(tmp_path), image_negatives=1, image_negative="other.png"), 1)
    with pytest.raises(UserError, match=r"^data\.resident: expected none with data\.image_negatives"):
        take(settings(shards(tmp_path), image_negatives=1, resident="host"), 1)
    words = ["objective.name=negclip", "objective.image_negatives=2", "train.epochs=1", "data.text_negatives=1"]
    with pytest.raises(UserError, match=r"data\.image_negatives: objective negclip needs 2, got 0"):
        load(None, words)
    with pytest.raises(UserError, match=r"data\.image_negatives: objective clip needs none, got 1"):
        load(None, ["objective.name=clip", "train.epochs=1", "data.image_negatives=1"])


def test_model_and_costs_count_them():
    words = ["train.epochs=1", "objective.name=negclip", "data.text_negatives=1", "data.image_size=32"]
    config = load(None, [*words, "objective.image_negatives=2", "data.image_negatives=2"])
    model = model_of(config, load_tokenizer("emoji", config.data.context_length)).eval()
    images = tuple(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8) for _ in range(3))
    out = model(images=images)
    assert out["image_views"] == ()
    for rows, pixels in zip(out["image_negatives"], images[1:], strict=True):
        torch.testing.assert_close(rows, model(images=(pixels,))["image"])
    assert encoder_cost(config) - encoder_cost(load(None, words)) == 1
