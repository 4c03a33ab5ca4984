"""`gram` and `column_mean` are moments of the global batch, with the gradients of whatever stands on them."""

import pytest
import torch

from amclr_scale.similarity import column_mean, gram, rank, world_size
from tests.similarity.definition import draw, relative_error


def cyclic(image, text, product, B):
    """CyCLIP's two cyclic terms from D x D moments."""
    a, c, m = product(image, image), product(text, text), product(text, image)
    in_modal = (a.square().sum() + c.square().sum() - 2 * m.square().sum()) / B
    return in_modal + 0.5 * 2 * ((a * c).sum() - (m * m.T).sum()) / B


def worst_error(b, D, seed, negatives="all"):
    """Each rank returns the same global value / W, so the sum over ranks is the global value."""
    W = world_size()
    everything = draw(b * W, D, seed)
    members = {"all": W, "local": 1}.get(negatives, negatives)
    rows = slice(rank() * b, (rank() + 1) * b)
    leaves = [x[rows].clone().requires_grad_() for x in (everything.image, everything.text)]

    def moments(x, y):
        return gram(x, y, negatives=negatives)

    value = cyclic(*leaves, moments, b * members) + column_mean(leaves[0], negatives=negatives).square().sum()
    got = [value, *torch.autograd.grad(value / members, leaves)]

    exact = [x.clone().requires_grad_() for x in (everything.image, everything.text)]
    first = rank() // members * members * b
    group = slice(first, first + members * b)
    image, text = (x[group] for x in exact)
    intra = (image @ image.T - text @ text.T).square().sum() / len(image)
    s = image @ text.T
    want_value = intra + 0.5 * (s - s.T).square().sum() / len(image) + image.mean(0).square().sum()
    want = [want_value, *(x[rows] for x in torch.autograd.grad(want_value, exact))]
    return max(relative_error(x, y) for x, y in zip(got, want, strict=True))


def test_cyclic_terms_need_no_matrix_of_similarities():
    assert worst_error(15, 6, 0) < 1e-12


@pytest.mark.parametrize("W", [2, 4])
def test_ranks_are_one_big_batch(ranks, W):
    for negatives in ("all", "local", 2):
        assert max(ranks(W, worst_error, 7, 5, 3, negatives)) < 1e-12


def test_sums_are_float32_under_autocast():
    x = torch.randn(300, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product, mean = gram(x, x), column_mean(x)
    assert product.dtype == mean.dtype == torch.float32
    torch.testing.assert_close(product.double(), x.double().T @ x.double(), rtol=1e-5, atol=1e-4)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="y: expected 3 rows"):
        gram(torch.ones(3, 2), torch.ones(4, 2))
