"""Alignment, uniformity and cross-uniformity are their definitions by distances."""

import pytest
import torch
import torch.nn.functional as F

from amclr_scale.types import Embeddings
from tests.objectives.harness import B, assert_same, defined, joined, run


def definition(temperature=None, alignment=1.0, uniformity=1.0, cross_uniformity=1.0):
    def spread(x, y):
        distances = (x[:, None] - y[None]).square().sum(-1)
        return (-2 * distances)[~torch.eye(B, dtype=torch.bool)].exp().mean().log()

    def loss(state, e: Embeddings, step: int):
        logits = e.image @ e.text.T / (1 / e.logit_scale if temperature is None else temperature)
        labels = torch.arange(B)
        value = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        value = value + alignment * (e.image - e.text).square().sum(1).mean()
        value = value + uniformity * (spread(e.image, e.image) + spread(e.text, e.text)) / 2
        value = value + cross_uniformity * spread(e.image, e.text)
        return value, value

    return loss


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.1, "alignment": 0.3, "uniformity": 2.0, "cross_uniformity": 0.7}], ids=str
)
def test_matches_its_definition(ranks, options):
    want = defined(definition(**options))
    for chunk in (1, 5, 100):
        got = run("uniformity", options, chunk=chunk)
        # the definition's gradient along a row's own length differs: ours takes |z| = 1 for granted
        assert_same((tangential(got[0]), {}), (tangential(want[0]), {}))
    for world_size in (2, 4):
        got = joined(ranks(world_size, run, "uniformity", options, chunk=3))
        assert_same((tangential(got[0]), {}), (tangential(want[0]), {}))


def tangential(steps):
    """Only the part of the gradients that moves rows on the sphere: what a normalising model passes on."""
    from tests.objectives.harness import global_batch

    for number, step in enumerate(steps):
        e = global_batch(number)
        for name, rows in (("image", e.image), ("text", e.text)):
            grad = step.rows[name]
            step.rows[name] = (grad - (grad * rows).sum(1, keepdim=True) * rows).detach()
    return steps
