"""DCL and DCLW are their definitions, and DCL is SogCLR without memory."""

import pytest
import torch

from amclr_scale.types import Embeddings
from tests.objectives.harness import assert_same, close, defined, joined, off_diagonal, run


def definition(temperature=None, sigma=None):
    def loss(state, e: Embeddings, step: int):
        t = 1 / e.logit_scale if temperature is None else temperature
        s = e.image @ e.text.T
        positive = s.diagonal()
        weight = 1 if sigma is None else 2 - (positive / sigma).exp() / (positive / sigma).exp().mean()
        rows = [off_diagonal(x / t).logsumexp(1) - weight * positive / t for x in (s, s.T)]
        value = (rows[0] + rows[1]).mean()
        return value, value

    return loss


SETTINGS = [
    ("dcl", {"temperature": 0.1}),
    ("dcl", {"temperature": None}),
    ("dclw", {"temperature": 0.1, "sigma": 0.3}),
    ("dclw", {"temperature": None}),
]


def defined_with(name, options):
    sigma = options.get("sigma", 0.5) if name == "dclw" else None
    return defined(definition(options["temperature"], sigma))


@pytest.mark.parametrize(("name", "options"), SETTINGS, ids=str)
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_matches_its_definition(name, options, chunk):
    assert_same(run(name, options, chunk=chunk), defined_with(name, options))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_are_one_batch(ranks, world_size):
    for name, options in SETTINGS:
        assert_same(joined(ranks(world_size, run, name, options, chunk=3)), defined_with(name, options))


def test_sogclr_without_memory_is_dcl():
    """t grad(DCL) = grad(SogCLR, gamma = 1), at every step: with gamma = 1 nothing is remembered."""
    t = 0.05
    dcl, _ = run("dcl", {"temperature": t})
    sogclr, _ = run("sogclr", {"temperature": t, "gamma": 1.0})
    for a, b in zip(dcl, sogclr, strict=True):
        for name in ("image", "text"):
            close(t * a.rows[name], b.rows[name], 1e-12, name)
        assert b.rows["image"].abs().max() > 1e-3


def test_the_weights_of_dclw_average_to_one():
    from amclr_scale.objectives.dcl import positive_weight

    weight = positive_weight(torch.linspace(-1, 1, 7, dtype=torch.float64), sigma=0.01)
    assert weight.isfinite().all()
    close(weight.mean(), torch.tensor(1.0, dtype=torch.float64), 1e-12, "mean weight")
