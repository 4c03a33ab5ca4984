"""Softmaxes of functions of similarities are those of whole matrices, in both directions and on any number of ranks."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.similarity import rank, softmaxes, using, world_size

D = 5


def entries(a: Tensor, b: Tensor, n: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Two products, a number per column and one for all; x and y differ, and both have gradients into everything."""
    return (a * b + n * a).tanh() * scale, (a - n * b).square() * scale.sqrt()


def one_product(s: Tensor) -> tuple[Tensor, Tensor]:
    x = 3 * s.sin()
    return x, x


def given(B: int) -> list[Tensor]:
    """Rows, rows, columns, columns (B, D), a number per column (B,), and one for all."""
    g = torch.Generator().manual_seed(B)
    rows = [F.normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=1) for _ in range(4)]
    return [*rows, torch.rand(B, generator=g, dtype=torch.float64), torch.tensor(7.0, dtype=torch.float64)]


def upstream(B: int) -> list[Tensor]:
    return list(torch.randn(7, B, generator=torch.Generator().manual_seed(9), dtype=torch.float64))


def dense(B: int, exclude: bool, one: bool) -> list[Tensor]:
    """The seven outputs (B,), and the gradients of their sum with the weights `upstream`."""
    leaves = [x.requires_grad_() for x in given(B)]
    a, b, k, m, n, scale = leaves
    x, y = one_product(a @ k.T) if one else entries(a @ k.T, b @ m.T, n, scale)
    found = []
    for logits, values in ((x, y), (x.T, y.T)):
        there = logits.masked_fill(torch.eye(B, dtype=torch.bool), -torch.inf) if exclude else logits
        found += [there.logsumexp(1), (there.softmax(1) * values).sum(1), values.mean(1)]
    found.append(y.diagonal())
    total = sum((w * v).sum() for w, v in zip(upstream(B), found, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(v.detach() for v in found), *gradients]


def ours(B: int, exclude: bool, one: bool, chunk: int | str) -> list[Tensor]:
    """The same of this rank's rows."""
    b = B // world_size()
    mine = slice(rank() * b, (rank() + 1) * b)
    leaves = [(x if x.ndim == 0 else x[mine]).clone().requires_grad_() for x in given(B)]
    a, c, k, m, n, scale = leaves
    with using(chunk=chunk):
        if one:
            sides = softmaxes(one_product, (a,), (k,), expected=True, mean=True, exclude_positive=exclude)
        else:
            more = {"per_column": (n,), "shared": (scale,), "expected": True, "mean": True}
            sides = softmaxes(entries, (a, c), (k, m), **more, exclude_positive=exclude)
    found = [getattr(side, name) for side in sides for name in ("log_sum", "expected", "mean")]
    found.append(sides[1].positive)
    total = sum((w[mine] * v).sum() for w, v in zip(upstream(B), found, strict=True))
    gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [*(v.detach() for v in found), *gradients]


CASES = [(exclude, one) for exclude in (False, True) for one in (False, True)]


def all_of_ours(B: int, chunk: int | str) -> list[list[Tensor]]:
    return [ours(B, *case, chunk) for case in CASES]


def close(got: list[Tensor], want: list[Tensor], what: object) -> None:
    for number, (x, y) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-11, msg=lambda m, k=number: f"{what}, {k}\n{m}")


@pytest.mark.parametrize("chunk", [1, 3, "auto"])
def test_they_are_those_of_the_matrix(chunk):
    for case, got in zip(CASES, all_of_ours(10, chunk), strict=True):
        close(got, dense(10, *case), case)


@pytest.mark.parametrize("W", [2, 4])
def test_ranks_are_one_batch(ranks, W):
    answers = ranks(W, all_of_ours, 8, 3)
    for case, *parts in zip(CASES, *answers, strict=True):
        joined = [
            torch.stack(pieces).sum(0) if pieces[0].ndim == 0 else torch.cat(pieces)
            for pieces in zip(*parts, strict=True)
        ]
        close(joined, dense(8, *case), case)


def test_what_nobody_asks_for_has_no_gradient_and_costs_none():
    a, _, k, *_ = given(6)
    seen = []

    def fn(s: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(s.requires_grad)
        return one_product(s)

    with torch.no_grad():
        softmaxes(fn, (a.requires_grad_(),), (k,))
    rows, _ = softmaxes(fn, (a,), (k,))
    assert rows.expected.isnan().all()
    assert rows.mean.isnan().all()
    rows.log_sum.sum().backward()
    assert seen == [False, False, True]
    assert a.grad is not None
    assert k.grad is None


def test_blocks_of_backward_are_those_of_forward():
    """Also where the setting is another one by then."""
    a, _, k, *_ = given(7)
    seen = []

    def fn(s: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(len(s))
        return one_product(s)

    with using(chunk=3):
        rows, _ = softmaxes(fn, (a.requires_grad_(),), (k,))
    rows.log_sum.sum().backward()
    assert seen == [3, 3, 1] * 2


def test_autocast_changes_nothing():
    a, _, k, *_ = (x.float() for x in given(7)[:3])
    found = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (a, k)]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            rows, columns = softmaxes(lambda s: (9 * s, 9 * s), (leaves[0],), (leaves[1],))
            value = (rows.log_sum * columns.log_sum).sum()
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_small_temperatures_are_as_good_as_plain_autograd():
    """Logits of hundreds, float32 features, beside float64; half precision is made float32."""
    for dtype, most in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
        a, _, k, *_ = (x.to(dtype) for x in given(40)[:3])
        found = []
        for how in (dtype, torch.float64):
            leaves = [x.to(how).requires_grad_() for x in (a, k)]
            rows, columns = softmaxes(lambda s: (s / 0.005, s / 0.005), (leaves[0],), (leaves[1],))
            value = (rows.log_sum + columns.log_sum - 2 * rows.positive).mean()
            assert value.dtype == (torch.float64 if how == torch.float64 else torch.float32)
            found.append([x.double() for x in torch.autograd.grad(value, leaves)])
        for got, want in zip(*found, strict=True):
            assert (got - want).norm() < most * want.norm()


def test_an_anchor_without_keys_is_a_constant():
    a = torch.ones(1, 2, requires_grad=True)
    rows, columns = softmaxes(one_product, (a,), (torch.ones(1, 2),), expected=True, exclude_positive=True)
    assert rows.log_sum.item() == columns.log_sum.item() < -1e29
    (rows.expected + columns.expected).sum().backward()
    assert rows.expected.item() == 0
    assert torch.equal(a.grad, torch.zeros(1, 2))


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="columns: expected 3 rows, as many as rows, got 4"):
        softmaxes(one_product, (torch.ones(3, 2),), (torch.ones(4, 2),))
    with pytest.raises(ValueError, match=r"per_column\[0\]: expected 3 rows"):
        softmaxes(one_product, (torch.ones(3, 2),), (torch.ones(3, 2),), per_column=(torch.ones(2),))
