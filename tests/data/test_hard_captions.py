"""Wrong captions differ by one change, are the same on any number of ranks, and say where there are none."""

import json

import pytest
import torch

from amclr_scale.config import schema
from amclr_scale.config.load import load
from amclr_scale.data.captions.hard_captions import HardCaptions, swapped, with_other_attribute, with_other_number
from amclr_scale.data.decoding import Sample
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.build import model_of
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cost import encoder_cost, encoder_flops
from tests.data.shards import pair, settings, write_tar
from tests.data.test_loader import take


def test_rules():
    assert set(swapped("a dog and a cat")) == {"a cat and a dog"}
    assert set(swapped("Red dog's tail")) == {"dog's Red tail", "tail dog's Red", "Red tail dog's"}
    assert list(swapped("of the")) == ["the of"]
    assert list(swapped("dog")) == []
    assert "Blue car, left door" in set(with_other_attribute("Red car, left door"))
    assert "Red car, right door" in set(with_other_attribute("Red car, left door"))
    assert not any("car" not in one or "door" not in one for one in with_other_attribute("Red car, left door"))
    assert set(with_other_number("two of 12 dogs")) == {
        f"{n} of 12 dogs" for n in ("three", "four", "five", "six", "seven", "eight", "nine", "ten")
    }
    assert set(with_other_number("3 dogs")) == {f"{n} dogs" for n in (2, 4, 5, 6, 7, 8, 9, 10)}
    assert list(with_other_number("one dog")) == list(with_other_attribute("one dog")) == []


def sample(**content):
    return Sample({"json": json.dumps(content).encode()}, 10**6, 1000)


def test_draws_differ_from_the_caption_and_from_one_another():
    hard = HardCaptions(schema.Data(text_negatives=4))
    found = hard.draw("two red dogs", sample(), 0, 0, 7)
    assert len({"two red dogs", *found}) == 5
    assert found == hard.draw("two red dogs", sample(), 0, 0, 7)
    assert any(found != hard.draw("two red dogs", sample(), *name) for name in ((1, 0, 7), (0, 1, 7), (0, 0, 8)))
    assert HardCaptions(schema.Data(text_negatives=3)).draw("Dog dog cat", sample(), 0, 0, 0)[2] is None
    read = HardCaptions(schema.Data(text_negatives=2, text_negative="json.wrong"))
    assert set(read.draw("a", sample(wrong=["A", "b", "c"]), 0, 0, 0)) == {"b", "c"}
    assert read.draw("a", sample(wrong="b"), 0, 0, 0) == ["b", None]
    assert read.draw("a", sample(), 0, 0, 0) == [None, None]


def shards(folder):
    """Captions of two words, one word, and one whose words are the same but for their size."""
    captions = ["red dog", "dog", "Dog dog", "two small cats"]
    members = []
    for i in range(16):
        members += [(name, data) for name, data in pair(i) if not name.endswith("txt")]
        members.append((f"{i:06d}.txt", captions[i % 4].encode()))
    return str(write_tar(folder / "0.tar", members))


def test_they_come_with_their_samples_on_any_number_of_ranks_and_workers(tmp_path):
    data = settings(shards(tmp_path), text_negatives=2, text_views=1)
    loader = TrainLoader(data, seed=0, global_batch_size=8)
    whole = [next(loader) for _ in range(3)]
    masks = torch.cat([batch.given["text_negative_mask"] for batch in whole])
    assert loader.repeated()["missing_negatives"] == (~masks).double().mean()
    loader.close()
    for batch in whole:
        assert len(batch.texts) == 4
        mask = batch.given["text_negative_mask"]
        assert mask.dtype == torch.bool
        for row, kind in enumerate((batch.ids % 4).tolist()):
            assert mask[row].tolist() == [kind in (0, 3)] * 2
            tokens = [view[row].tolist() for view in (batch.texts[0], *batch.texts[2:])]
            there = [tokens[0], *(one for one, is_there in zip(tokens[1:], mask[row], strict=True) if is_there)]
            assert len({tuple(one) for one in there}) == len(there)
    halves = zip(take(data, 3, rank=0, world_size=2, workers=1), take(data, 3, rank=1, world_size=2), strict=True)
    for batch, parts in zip(whole, halves, strict=True):
        for ours, theirs in zip(batch.texts, zip(*(p.texts for p in parts), strict=True), strict=True):
            assert torch.equal(ours, torch.cat(theirs))
        assert torch.equal(batch.given["text_negative_mask"], torch.cat([p.given["text_negative_mask"] for p in parts]))


def test_what_is_cut_off_is_no_difference(tmp_path):
    words = " ".join("w" for _ in range(30)) + " red dog"
    members = [(name, data) for name, data in pair(0) if not name.endswith("txt")] + [("000000.txt", words.encode())]
    data = settings(str(write_tar(tmp_path / "0.tar", members)), text_negatives=1, lanes=1, text_negative="attribute")
    batch = take(data, 1, global_batch_size=1)[0]
    assert not batch.given["text_negative_mask"].any()


def test_rules_that_never_apply_are_told(tmp_path):
    with pytest.raises(UserError, match=r"data\.text_negative: expected rules or places that give wrong captions"):
        take(settings(shards(tmp_path), text_negatives=1, text_negative="json.wrong"), 1)
    with pytest.raises(
        UserError, match=r"data\.text_negative: expected words, attribute or number, or json\.FIELD, got"
    ):
        load(None, ["objective.name=negclip", "train.epochs=1", "data.text_negatives=1", "data.text_negative=word"])
    with pytest.raises(UserError, match=r"data\.text_negatives: objective negclip needs 1, got 0"):
        load(None, ["objective.name=negclip", "train.epochs=1"])


def test_model_and_costs_count_them():
    words = ["train.epochs=1", "objective.name=negclip", "objective.negatives=2", "data.text_negatives=2"]
    config, plain = load(None, words), load(None, words[:1])
    texts = tuple(torch.randint(3, 90, (2, config.data.context_length)) for _ in range(3))
    model = model_of(config, load_tokenizer("emoji", config.data.context_length)).eval()
    out = model(texts=texts)
    assert out["text_views"] == ()
    for rows, tokens in zip(out["text_negatives"], texts[1:], strict=True):
        torch.testing.assert_close(rows, model(texts=(tokens,))["text"])
    assert encoder_cost(config) == 2
    assert encoder_cost(plain) == 1
    views = load(None, [*words[:1], "objective={name: simclr, modality: text}", "data.text_views=1"])
    of_a_text = encoder_flops(views) - encoder_flops(plain)
    assert encoder_flops(config) - encoder_flops(plain) == pytest.approx(2 * of_a_text)
