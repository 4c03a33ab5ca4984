"""Collectives: rank order, gradients, groups; alone without a process group."""

import pytest
import torch

from amclr_scale.distributed.collectives import (
    all_gather,
    all_sum,
    broadcast,
    exchange,
    gather,
    group,
    pass_on,
    rank,
    reduce_scatter,
    world_size,
)


def test_alone_everything_is_the_identity():
    x = torch.randn(4, 3, requires_grad=True)
    assert (rank(), world_size()) == (0, 1)
    assert all_sum(x) is x
    assert gather(x) is x
    for function in (all_gather, reduce_scatter):
        assert torch.equal(function(x), x)
        assert not function(x).requires_grad
    assert torch.equal(exchange(x[None]), x[None])
    assert torch.equal(broadcast(x, 0, (4, 3), group()), x)


def one_rank(dtype_name, members):
    ranks = group(members)
    dtype = getattr(torch, dtype_name)
    x = (torch.arange(6).view(2, 3) + 10 * rank()).to(dtype)
    peers = range(ranks.first, ranks.first + ranks.size)
    everyone = torch.cat([(torch.arange(6).view(2, 3) + 10 * r).to(dtype) for r in peers])
    assert torch.equal(all_gather(x, ranks), everyone)
    assert torch.equal(pass_on(x, ranks).wait(), everyone.view(ranks.size, 2, 3)[(ranks.rank + 1) % ranks.size])
    assert torch.equal(broadcast(x, ranks.size - 1, (2, 3), ranks), everyone[-2:])


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16", "int64", "bool"])
def test_any_dtype_travels_in_rank_order(ranks, dtype):
    ranks(3, one_rank, dtype, "all")
    ranks(4, one_rank, dtype, 2)


def gradients():
    W, r = world_size(), rank()
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, W, 2, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(W, 2 * W, 3, generator=generator, dtype=torch.float64)
    mine = x[r].clone().requires_grad_()
    (got,) = torch.autograd.grad((all_sum(mine) * w[r]).sum(), mine)
    torch.testing.assert_close(got, w.sum(0))
    gathered = gather(mine)
    torch.testing.assert_close(gathered, x.flatten(0, 1))
    (got,) = torch.autograd.grad((gathered * v[r]).sum(), mine)
    torch.testing.assert_close(got, v.sum(0)[2 * r : 2 * r + 2])
    parts = v[r].view(W, 2, 3)
    torch.testing.assert_close(exchange(parts), v.view(W, W, 2, 3)[:, r])


@pytest.mark.parametrize("W", [2, 3])
def test_gradients_are_those_of_the_sum_over_ranks(ranks, W):
    ranks(W, gradients)


def twice():
    x = torch.ones(2, requires_grad=True)
    (first,) = torch.autograd.grad(all_sum(x**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order gradients"):
        first.sum().backward()


def test_second_order_gradients_are_refused(ranks):
    ranks(2, twice)
