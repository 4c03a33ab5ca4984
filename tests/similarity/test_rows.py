"""`map_rows` runs any row function over blocks, and is differentiated as if there were one matrix; so is a mean."""

import pytest
import torch

from amclr_scale.similarity import map_rows, mean_rows, rank, using, world_size
from tests.similarity.definition import draw, relative_error


def hinge(margin):
    """The sum of hinges over the negatives, and the hardest negative; captures a tensor with gradient."""

    def rows(block, positive, weight):
        own = block.gather(1, positive[:, None])
        others = block.scatter(1, positive[:, None], -torch.inf)
        return weight * (margin + others - own).relu().sum(1), others.amax(1)

    return rows


def worst_error(b, D, chunk, *, negatives="all", dtype="float64"):
    W = world_size()
    everything = draw(b * W, D, 0, dtype=getattr(torch, dtype))
    margin = torch.tensor(0.3, dtype=everything.image.dtype)
    rows = slice(rank() * b, (rank() + 1) * b)
    weight = everything.image_temperature
    leaves = [x.clone().requires_grad_() for x in (everything.image[rows], everything.text[rows], weight[rows], margin)]
    with using(chunk=chunk):
        losses, hardest = map_rows(hinge(leaves[3]), leaves[0], leaves[1], leaves[2], negatives=negatives)
    got = [losses, hardest, *torch.autograd.grad(((losses + hardest) * everything.upstream[0, rows]).sum(), leaves)]

    image, text, weight, margin = exact = [
        x.double().requires_grad_() for x in (everything.image, everything.text, weight, margin)
    ]
    group = b * {"all": W, "local": 1}.get(negatives, negatives)
    parts = [slice(first, first + group) for first in range(0, b * W, group)]
    results = [hinge(margin)(image[p] @ text[p].T, torch.arange(group), weight[p]) for p in parts]
    losses, hardest = (torch.cat(x) for x in zip(*results, strict=True))
    weighted = (losses + hardest) * everything.upstream[0].double()
    features = torch.autograd.grad(weighted.sum(), exact[:3], retain_graph=True)
    own = torch.autograd.grad(weighted[rows].sum(), exact[3])
    want = [losses[rows], hardest[rows], *(x[rows] for x in features), *own]
    return max(relative_error(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("chunk", [1, 3, 20, 100, "auto"])
def test_it_is_the_dense_function(chunk):
    assert worst_error(20, 6, chunk) < 1e-12
    assert worst_error(20, 6, chunk, dtype="float32") < 4e-6


@pytest.mark.parametrize("W", [2, 4])
def test_ranks_are_one_big_batch(ranks, W):
    for negatives in ("all", "local", 2):
        assert max(ranks(W, worst_error, 5, 4, 2, negatives=negatives)) < 1e-12


def test_no_block_is_held_for_backward():
    b, D = 512, 8
    image, text = torch.randn(2, b, D).requires_grad_().unbind()
    held = {}

    def pack(x):
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with using(chunk=32), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        map_rows(lambda block, positive: (block.exp().sum(1),), image, text)
    assert sum(held.values()) < b * b * 4 / 8


def test_blocks_are_float32_whatever_the_features_and_autocast():
    seen = []

    def rows(block, positive):
        seen.append(((block @ block.T).dtype, block.dtype))
        return (block.exp().sum(1),)

    image = torch.randn(4, 3).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (total,) = map_rows(rows, image, image)
    total.sum().backward()
    assert set(seen) == {(torch.float32, torch.float32)}
    assert len(seen) == 2  # backward ran it again
    assert image.grad.dtype == torch.bfloat16


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="keys: expected 3 rows"):
        map_rows(lambda block, positive: (block.sum(1),), torch.ones(3, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match=r"per_row\[0\]: expected 3 rows"):
        map_rows(lambda block, positive, x: (x,), torch.ones(3, 2), torch.ones(3, 2), torch.ones(2))
    with pytest.raises(ValueError, match=r"keys: expected \(b, D\) like anchors, which are \(3, 2\), got \(3, 4\)"):
        map_rows(lambda block, positive: (block.sum(1),), torch.ones(3, 2), torch.ones(3, 4))


@pytest.mark.parametrize(
    ("fn", "got"),
    [
        (lambda block, positive: block.exp(), "Tensor"),  # would be taken apart row by row
        (lambda block, positive: (block.sum(1), block.sum()), r"\[\(2,\), \(\)\]"),
        (lambda block, positive: (block.sum(1, keepdim=True).T,), r"\[\(1, 2\)\]"),  # one row per block, not per anchor
    ],
)
def test_a_row_function_answers_for_every_row(fn, got):
    with using(chunk=2), pytest.raises(ValueError, match=rf"fn: expected a tuple of tensors with 2 rows, .* got {got}"):
        map_rows(fn, torch.ones(4, 3), torch.ones(4, 3))


def mean_error(b, D, chunk, *, negatives="all"):
    """Of `mean_rows` from the mean of `map_rows`, with upstream gradients that differ from rank to rank."""
    everything = draw(b * world_size(), D, 0, dtype=torch.float64)
    rows = slice(rank() * b, (rank() + 1) * b)
    found = []
    for of_mean in (True, False):
        given = (everything.image[rows], everything.text[rows], everything.image_temperature[rows], torch.ones(3))
        leaves = [x.clone().double().requires_grad_() for x in given]

        def fn(block, positive, weight, shared=leaves[3]):
            hinges, hardest = hinge(0.3 * shared.mean())(block, positive, weight)
            return hinges + hardest * shared.square().sum()

        with using(chunk=chunk):
            if of_mean:
                value = mean_rows(fn, *leaves[:3], shared=(leaves[3],), negatives=negatives)
            else:
                value = map_rows(lambda *x: (fn(*x),), *leaves[:3], negatives=negatives)[0].mean()
        gradients = torch.autograd.grad(value * (1 + rank()), leaves)
        found.append([value, *gradients])
    return max(relative_error(x, y) for x, y in zip(*found, strict=True))


def test_a_mean_is_that_of_the_rows():
    assert mean_error(20, 6, 3) < 1e-12
    assert mean_error(20, 6, "auto") < 1e-12


def test_a_mean_of_rows_of_several_products():
    a, b, k, *_ = torch.randn(4, 9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).unbind()
    found = []
    for chunk in (2, "auto", None):
        leaves = [x.clone().requires_grad_() for x in (a, b, k)]
        if chunk is None:
            s, r = leaves[0] @ leaves[1].T, leaves[1] @ leaves[2].T
            value = (s.softmax(1) * r.sin()).sum(1).mean()
        else:
            with using(chunk=chunk):
                value = mean_rows(
                    lambda s, r, own: (s.softmax(1) * r.sin()).sum(1), (leaves[0], leaves[1]), (leaves[1], leaves[2])
                )
        found.append([value, *torch.autograd.grad(value, leaves)])
    for *ours, want in zip(*found, strict=True):
        assert max(relative_error(x, want) for x in ours) < 1e-12


def test_a_mean_over_ranks(ranks):
    for negatives in ("all", "local"):
        assert max(ranks(2, mean_error, 5, 4, 2, negatives=negatives)) < 1e-12


def test_a_mean_asks_for_no_gradient_that_nobody_needs():
    image, text = torch.randn(2, 6, 4).unbind()
    runs = []

    def fn(block, positive, shared):
        runs.append(block.requires_grad)
        return (block * shared).sum(1)

    with torch.no_grad():
        value = mean_rows(fn, image.requires_grad_(), text, shared=(torch.ones(()),))
    assert runs == [False]
    assert not value.requires_grad
    shared = torch.ones((), requires_grad=True)
    mean_rows(fn, image.detach(), text, shared=(shared,)).backward()
    assert runs == [False, False]
    torch.testing.assert_close(shared.grad, (image @ text.T).sum(1).mean().detach())
    with pytest.raises(ValueError, match=r"fn: expected a number of each of the block's 6 rows, got \(\)"):
        mean_rows(lambda block, positive: block.sum(), image, text)


def several_products(B: int) -> list[torch.Tensor]:
    """Of this rank's rows: the mean, and gradients of what is a row in one product and a column in the other."""
    b = B // world_size()
    mine = slice(rank() * b, (rank() + 1) * b)
    g = torch.Generator().manual_seed(2)
    a, c, k = (x[mine].clone() for x in torch.randn(3, B, 5, dtype=torch.float64, generator=g))
    c.requires_grad_()
    k.requires_grad_()
    with using(chunk=3):
        value = mean_rows(lambda s, r, own: (s.softmax(1) * r.sin()).sum(1), (a, c), (c, k))
    return [value.detach()[None], *(x / world_size() for x in torch.autograd.grad(value, (c, k)))]


def test_several_products_over_ranks(ranks):
    """Of the first one only the columns have a gradient."""
    value, *gradients = (torch.cat(parts) for parts in zip(*ranks(2, several_products, 8), strict=True))
    a, c, k = torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    c.requires_grad_()
    k.requires_grad_()
    whole = ((a @ c.T).softmax(1) * (c @ k.T).sin()).sum(1).mean()
    for found, want in zip((value.mean(), *gradients), (whole, *torch.autograd.grad(whole, (c, k))), strict=True):
        assert relative_error(found, want) < 1e-12
