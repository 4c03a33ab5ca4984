"""VRNS is CLIP and the spread of negative similarities, of a B x B matrix here."""

import pytest
import torch
import torch.nn.functional as F

from tests.objectives.harness import NUM_SAMPLES, B, assert_same, defined, joined, make, run


def definition(weight, target, t=0.1):
    def loss(state, e, step):
        s = e.image @ e.text.T
        labels, others = torch.arange(B), ~torch.eye(B, dtype=torch.bool)
        clip = (F.cross_entropy(s / t, labels) + F.cross_entropy(s.T / t, labels)) / 2
        value = clip + weight * (s[others] - target).square().mean()
        return value, value

    return loss


SETTINGS = [
    ({"temperature": 0.1}, definition(30.0, -1 / (NUM_SAMPLES - 1))),
    ({"temperature": 0.1, "weight": 2.0, "target": 0.3}, definition(2.0, 0.3)),
]


def test_matches_its_definition_on_any_number_of_ranks(ranks):
    for options, define in SETTINGS:
        want = defined(define)
        for chunk in (3, 100):
            assert_same(run("vrns", options, chunk=chunk), want)
        for world_size in (2, 4):
            assert_same(joined(ranks(world_size, run, "vrns", options, chunk=3)), want)


def test_without_its_penalty_it_is_clip():
    assert_same(run("vrns", {"weight": 0.0}), run("clip", {}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": -1.0}, "weight: expected a weight of at least 0"),
        ({"target": 1.0}, r"target: expected a similarity in \[-1, 1\), or null"),
        ({"temperature": 0.0}, "temperature: expected a positive number"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("vrns", **options)
