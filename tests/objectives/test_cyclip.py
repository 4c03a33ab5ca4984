"""CyCLIP's three D x D matrices give the sums over all B x B pairs, gradients included."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, joined, make, run


def definition(lambda_in=0.25, lambda_cross=0.25, temperature=None, inmodal=False):
    def cross_entropy(a, b, t):
        return F.cross_entropy(a @ b.T / t, torch.arange(B))

    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        s = e.image @ e.text.T
        value = (cross_entropy(e.image, e.text, t) + cross_entropy(e.text, e.image, t)) / 2
        if inmodal:
            images, texts = cross_entropy(e.image, e.image_views[0], t), cross_entropy(e.text, e.text_views[0], t)
            value = (value + (images + texts) / 2) / 2
        value = value + lambda_in / B * (e.image @ e.image.T - e.text @ e.text.T).square().sum()
        value = value + lambda_cross / B * (s - s.T).square().sum()
        return value, value

    return loss


SETTINGS = [{}, {"lambda_in": 0.6, "lambda_cross": 0.0}, {"temperature": 0.1, "inmodal": True, "lambda_cross": 2.0}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_matches_its_definition(ranks, options):
    batch = {"views": int(options.get("inmodal", False))}
    want = defined(definition(**options), batch=batch)
    for chunk in (1, 5, 100):
        assert_same(run("cyclip", options, chunk=chunk, batch=batch), want)
    for world_size in (2, 4):
        assert_same(joined(ranks(world_size, run, "cyclip", options, chunk=3, batch=batch)), want)


def test_weights_are_checked():
    with pytest.raises(ValueError, match="lambda_in: expected a weight of at least 0"):
        make("cyclip", lambda_in=-1.0)
