"""VICReg is its definition, on embeddings of any length."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.objectives.vicreg import VICReg
from amclr_scale.types import Embeddings
from tests.objectives.harness import D, assert_same, defined, joined, run


def definition(invariance=25.0, variance=25.0, covariance=1.0):
    def loss(state, e: Embeddings, step: int):
        value = invariance * F.mse_loss(e.image, e.text)
        for x in (e.image, e.text):
            std = (x.var(0) + 1e-4).sqrt()
            value = value + variance / 2 * F.relu(1 - std).mean()
            c = torch.cov(x.T)
            value = value + covariance / D * (c - c.diagonal().diag()).square().sum()
        return value, value

    return loss


@pytest.mark.parametrize("options", [{}, {"invariance": 1.0, "variance": 0.5, "covariance": 40.0}], ids=str)
def test_matches_its_definition(ranks, options):
    want = defined(definition(**options))
    assert_same(run("vicreg", options), want)
    for world_size in (2, 4):
        assert_same(joined(ranks(world_size, run, "vicreg", options)), want)


def test_says_that_it_wants_rows_of_any_length():
    assert not VICReg.needs_unit_rows
