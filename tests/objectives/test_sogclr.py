"""SogCLR is its definition, step after step, with ids that come back."""

import math

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import NUM_SAMPLES, STEPS, assert_same, defined, joined, make, off_diagonal, run


def definition(t=0.07, gammas=(0.8,) * STEPS, margin=None):
    """u itself, not its logarithm, in float64; the last of several equal ids is kept."""

    def loss(state, e: Embeddings, step: int):
        s = e.image @ e.text.T
        value = objective = 0
        for name, sim in (("image_state.log_u", s), ("text_state.log_u", s.T)):
            log_u = state.setdefault(name, torch.full((NUM_SAMPLES,), -math.inf, dtype=torch.float64))
            h = sim - sim.diagonal()[:, None]
            f = h if margin is None else (h + margin).clamp(min=0) ** 2
            g = off_diagonal(f / t).exp().sum(1) / (len(s) - 1)
            old = log_u[e.ids].exp()
            u = torch.where(old == 0, g, (1 - gammas[step]) * old + gammas[step] * g).detach()
            for i, row in enumerate(e.ids.tolist()):
                log_u[row] = u[i].log()
            value = value + (t * g / u).mean()
            objective = objective + t * u.log().mean()
        return value, objective

    return loss


SETTINGS = [
    ({"temperature": 0.07, "gamma": 0.8}, definition()),
    ({"temperature": 0.03, "gamma": 0.3}, definition(0.03, (0.3,) * STEPS)),
    ({"surrogate": "squared_hinge", "margin": 0.7, "temperature": 0.1}, definition(0.1, margin=0.7)),
]


@pytest.mark.parametrize("which", range(len(SETTINGS)))
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matches_its_definition(which, chunk):
    options, define = SETTINGS[which]
    assert_same(run("sogclr", options, chunk=chunk), defined(define))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("sample_state", ["replicated", "sharded"])
def test_ranks_are_one_batch(ranks, world_size, sample_state):
    """Also where one id occurs on two ranks in one step."""
    batch = {"duplicate": True}
    for options, define in SETTINGS:
        got = ranks(world_size, run, "sogclr", options, chunk=3, batch=batch, sample_state=sample_state)
        assert_same(joined(got), defined(define, batch=batch))


def test_gamma_falls_from_one_along_a_cosine_by_whole_epochs():
    epochs = (0.0, 0.9, 1.0, 2.5, 7.0)
    gammas = [1.0, 1.0, *(0.2 + 0.8 * (1 + math.cos(math.pi * e / 4)) / 2 for e in (1, 2)), 0.2]
    options = {"gamma": 0.2, "gamma_schedule": "cosine", "gamma_epochs": 4}
    assert_same(run("sogclr", options, epochs=epochs), defined(definition(gammas=gammas)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 0.0}, "gamma: expected a weight"),
        ({"gamma": 1.1}, "gamma: expected a weight"),
        ({"gamma_schedule": "cosine"}, "gamma_epochs: expected a positive number of epochs"),
        ({"gamma_epochs": 10.0}, "gamma_epochs: expected null, the default, for only gamma_schedule cosine reads it"),
        ({"log_alpha": 3.0}, "log_alpha: expected 10.0, the default, for only gamma_schedule scent reads it, got 3.0"),
        ({"margin": 0.3}, "margin: expected 1.0, the default, for only surrogate squared_hinge reads it, got 0.3"),
        ({"temperature": -1.0}, "temperature: expected a positive number"),
        ({"num_texts": 0}, "num_texts: expected the number of texts"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        make("sogclr", **options)
