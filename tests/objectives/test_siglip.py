"""SigLIP is its definition: one logistic loss per pair, learned scale and bias included."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, global_batch, joined, make, run


def definition(state, e: Embeddings, step: int):
    sign = 2 * torch.eye(B) - 1
    value = F.softplus(-sign * (e.logit_scale * e.image @ e.text.T + e.logit_bias)).sum() / B
    return value, value


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matches_its_definition(chunk):
    assert_same(run("siglip", {}, chunk=chunk), defined(definition))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    assert_same(joined(ranks(world_size, run, "siglip", {}, chunk=3)), defined(definition))


def test_needs_a_learned_bias():
    e = global_batch(0)
    with pytest.raises(ValueError, match=r"embeddings\.logit_bias"):
        make("siglip")(Embeddings(e.image, e.text, logit_scale=e.logit_scale))
