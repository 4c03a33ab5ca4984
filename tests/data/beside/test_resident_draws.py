"""What views show is drawn from tables for all samples at once: as it is drawn from one sample after the other."""

import json

import numpy as np
import pytest
import torch

from amclr_scale.config.schema import Data
from amclr_scale.data.decoding import BadSampleError, Sample
from amclr_scale.data.order import Visits
from amclr_scale.data.randomness import Draws, ManyDraws, Purpose
from amclr_scale.data.resident import tokens
from amclr_scale.data.resident.groups import Groups
from amclr_scale.data.resident.tokens import open_tokens
from amclr_scale.data.text_views import TextViews
from amclr_scale.data.tokenizers import Tokenizer

N = 300


def test_draws_of_many_names_are_those_of_each():
    """Also with the whole range of names, of limits, and of numbers."""
    g = np.random.default_rng(0)
    samples, passes = g.integers(0, 2**62, N), g.integers(0, 5, N)
    limits, numbers = g.integers(1, 2**32, N), g.integers(1, 4, N)
    for seed in (0, -3, 2**64 - 1):
        drawn = ManyDraws(seed, Purpose.TEXT, passes, samples, 2).below(limits, numbers)
        for i in range(N):
            draws = Draws(seed, Purpose.TEXT, int(passes[i]), int(samples[i]), 2)
            assert [draws.below(int(limits[i])) for _ in range(numbers[i])][-1] == drawn[i]


def test_sources_of_many_samples_are_those_of_each():
    """Groups of one to four, with as many further views as leave none and make some twice."""
    g = np.random.default_rng(1)
    groups = Groups([None if value > 100 else int(value) for value in g.integers(0, 120, N)])
    samples, passes = g.permutation(N), g.integers(0, 3, N)
    for further in (0, 1, 2, 5):
        found = groups.all_sources(samples, further, 7, passes)
        alone = [groups.sources(int(s), further, 7, int(p)) for s, p in zip(samples, passes, strict=True)]
        assert np.stack(found, 1).tolist() == alone
    sizes = groups._size
    assert {1, 2, 3, 4} <= {*sizes.tolist()}


def tokenizer() -> Tokenizer:
    """Of captions that are numbers: these are their tokens."""
    return Tokenizer(
        "numbers", lambda captions: [[int(word) for word in caption.split()] for caption in captions],
        lambda folder: None, dict, vocab_size=1000, pad_id=0, start_id=1, end_id=2, length=6,
    )  # fmt: skip


def contents(seed: int) -> list[dict[str, bytes]]:
    """Two places and a list, with captions that are missing, come twice, or stand in both; some cannot be read."""
    g, found = np.random.default_rng(seed), []
    for i in range(N):
        one, other, *several = (str(number) for number in g.integers(3, 9, 7))
        text = {"txt": " " if i % 50 == 7 else one, "alt": other if g.integers(0, 2) else ""}
        listed = "{" if i % 50 == 9 else json.dumps(several[: g.integers(0, 6)])
        found.append({name: value.encode() for name, value in {**text, "json": listed}.items() if value})
    return found


@pytest.mark.parametrize("views", [0, 1, 3])
@pytest.mark.parametrize(
    "places",
    [
        {"caption": "txt", "text_view": "json"},
        {"caption": ["txt", "alt"], "text_view": "json"},
        {"caption": ["txt", "json"], "text_view": ["alt", "json"]},
        {"caption": "json", "text_view": "nothing"},
    ],
)
def test_tokens_of_many_samples_are_those_of_each(tmp_path, monkeypatch, places, views):
    members = contents(views)

    def read(sample: int) -> Sample:
        if sample % 50 == 11:
            raise BadSampleError("truncated")
        return Sample(members[sample], 10, 100)

    monkeypatch.setattr(tokens, "_AT_ONCE", 64)
    data = Data(train="nothing", text_views=views, **places)
    text, numbers = TextViews(data), tokenizer()
    monkeypatch.setattr(Tokenizer, "fingerprint", lambda self: "numbers")
    held = open_tokens(tmp_path, ["here"], text, numbers, N, read)
    expected, bad = {}, []
    for sample in range(N):
        try:
            expected[sample] = [text.draw(read(sample), 5, epoch, sample) for epoch in range(3)]
        except BadSampleError:
            bad.append(sample)
    assert held.bad.nonzero()[0].tolist() == bad
    assert len(bad) >= 12
    good = np.array([*expected])
    for epoch in range(3):
        found = held(Visits(good, np.full(len(good), epoch)), 5)
        wanted = zip(*(expected[int(sample)][epoch] for sample in good), strict=True)
        for rows, captions in zip(found, wanted, strict=True):
            assert torch.equal(rows, numbers(list(captions)))
    if "json" in text.members:  # what a sample says twice is tokenised once
        assert len(held._tokens) < len(held._rows)
