"""CLIP is its definition: the mean cross-entropy of the rows and columns of one matrix of logits."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, joined, make, run


def definition(temperature=None, smoothing=0.0, groups=1):
    def of_group(image, text, t):
        logits = image @ text.T / t
        labels = torch.arange(len(image))
        rows = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return (rows + F.cross_entropy(logits.T, labels, label_smoothing=smoothing)) / 2

    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        pairs = zip(e.image.split(B // groups), e.text.split(B // groups), strict=True)
        value = sum(of_group(image, text, t) for image, text in pairs) / groups
        return value, value

    return loss


SETTINGS = [{}, {"temperature": 0.05}, {"label_smoothing": 0.2}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matches_its_definition(options, chunk):
    want = defined(definition(options.get("temperature"), options.get("label_smoothing", 0.0)))
    assert_same(run("clip", options, chunk=chunk), want)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    for options in SETTINGS:
        want = defined(definition(options.get("temperature"), options.get("label_smoothing", 0.0)))
        assert_same(joined(ranks(world_size, run, "clip", options, chunk=3)), want)


def test_groups_of_ranks_contrast_among_themselves(ranks):
    smoothed = {"label_smoothing": 0.1}
    local = joined(ranks(4, run, "clip", {"negatives": "local", **smoothed}))
    assert_same(local, defined(definition(smoothing=0.1, groups=4)))
    paired = joined(ranks(4, run, "clip", {"negatives": "grouped", "group_size": 2, **smoothed}))
    assert_same(paired, defined(definition(smoothing=0.1, groups=2)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a share"),
        ({"negatives": "grouped"}, "group_size: expected a number of ranks"),
        ({"group_size": 2}, "group_size: expected a number of ranks"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("clip", **options)


def test_a_learned_temperature_must_be_there():
    x = F.normalize(torch.randn(4, 3), dim=-1)
    with pytest.raises(ValueError, match=r"embeddings\.logit_scale"):
        make("clip")(Embeddings(x, x))
