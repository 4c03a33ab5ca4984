"""CLIP is its definition: the mean cross-entropy of the rows and columns of one matrix of logits."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, global_batch, joined, make, run


def definition(temperature=None, smoothing=0.0, groups=1, omega=0):
    def of_group(image, text, t):
        logits = image @ text.T / t
        labels = torch.arange(len(image))
        rows = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return (rows + F.cross_entropy(logits.T, labels, label_smoothing=smoothing)) / 2

    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        pairings = [(x, y) for x in (e.image, *e.image_views[:omega]) for y in (e.text, *e.text_views[:omega])]
        pairs = [
            pair
            for image, text in pairings
            for pair in zip(image.split(B // groups), text.split(B // groups), strict=True)
        ]
        value = sum(of_group(image, text, t) for image, text in pairs) / len(pairs)
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


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_are_the_same_on_any_number_of_ranks(ranks, groups):
    options = {"label_smoothing": 0.1, "group_size": B // groups}
    want = defined(definition(smoothing=0.1, groups=groups))
    assert_same(run("clip", options, chunk=3), want)
    assert_same(joined(ranks(2, run, "clip", options)), want)
    assert_same(joined(ranks(4, run, "clip", options)), want)


def test_groups_are_gradient_accumulation_without_a_cache():
    e = global_batch(0)
    for image, text in zip(e.image.split(2), e.text.split(2), strict=True):
        logits = image @ text.T * e.logit_scale
        labels = torch.arange(2)
        ((F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2 / (B // 2)).backward()
    (step, *_), _ = run("clip", {"group_size": 2}, epochs=(0.0,))
    torch.testing.assert_close(step.rows["image"], e.image.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(step.shared["logit_scale"], e.logit_scale.grad, rtol=0, atol=1e-14)


@pytest.mark.parametrize("omega", [1, 2])
def test_further_views_are_all_pairings(ranks, omega):
    options, views = {"omega": omega, "label_smoothing": 0.1, "group_size": 4}, {"views": 2}
    want = defined(definition(smoothing=0.1, omega=omega, groups=2), batch=views)
    assert_same(run("clip", options, batch=views), want)
    assert_same(joined(ranks(2, run, "clip", options, batch=views)), want)


def test_a_group_must_fit_the_ranks(ranks):
    with pytest.raises(ValueError, match="group_size: expected a divisor of the global batch 8"):
        run("clip", {"group_size": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected a share"),
        ({"group_size": 1}, "group_size: expected at least 2 pairs"),
        ({"omega": 9}, "omega: expected 0 to 8"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("clip", **options)


def test_a_learned_temperature_must_be_there():
    x = F.normalize(torch.randn(4, 3), dim=-1)
    with pytest.raises(ValueError, match=r"embeddings\.logit_scale"):
        make("clip")(Embeddings(x, x))
