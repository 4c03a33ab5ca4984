"""onlineCLR is its definition: one weight per pair, from two numbers of state."""

import math

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import assert_same, defined, global_batch, joined, make, my_rows, off_diagonal, run


def definition(t=0.05, gamma=0.5):
    def loss(state, e: Embeddings, step: int):
        s = e.image @ e.text.T
        value = objective = 0
        for name, exponents, own_t in (
            ("log_u_negative", off_diagonal(s / t), t),
            ("log_u_positive", -s.diagonal() / (10 * t), 10 * t),
        ):
            old = state.get(name, torch.tensor([-math.inf], dtype=torch.float64)).exp()
            terms = 2 * exponents.exp()
            u = ((1 - gamma) * old + gamma * terms.sum()).detach()
            state[name] = u.log()
            value = value + own_t * (terms / u).sum()
            objective = objective + own_t * u.log()
        return value, objective

    return loss


@pytest.mark.parametrize("options", [{"temperature": 0.05}, {"temperature": 0.05, "gamma": 1.0}], ids=str)
def test_matches_its_definition(ranks, options):
    want = defined(definition(options["temperature"], options.get("gamma", 0.5)))
    for chunk in (1, 5, 100):
        assert_same(run("onlineclr", options, chunk=chunk), want)
    for world_size in (2, 4):
        assert_same(joined(ranks(world_size, run, "onlineclr", options, chunk=3)), want)


def test_state_survives_a_checkpoint_and_half_precision():
    trained, fresh = make("onlineclr"), make("onlineclr").bfloat16()
    trained(my_rows(global_batch(0)))
    fresh.load_state_dict(trained.state_dict())
    assert trained.log_u_negative.isfinite().all()
    assert fresh(my_rows(global_batch(1))).value.item() == trained(my_rows(global_batch(1))).value.item()
