"""`top_k` is a full sort, over all ranks' keys, for any tile; equal similarities are ordered by row."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from amclr_scale.similarity import nearest, rank, top_k, using, world_size


def whole_numbers(rows, D, seed):
    """Small whole numbers: many equal similarities, each exact in float32."""
    return torch.randint(-1, 2, (rows, D), generator=torch.Generator().manual_seed(seed)).float()


def by_sorting(queries, keys, k, excluded=None):
    s = queries @ keys.T
    if excluded is not None:
        s[torch.arange(len(s)), excluded] = -torch.inf
    values, rows = s.sort(dim=1, descending=True, stable=True)
    return values[:, :k], rows[:, :k]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    q=st.integers(1, 20), n=st.integers(1, 30), k=st.integers(1, 30), seed=st.integers(0, 999), chunk=st.integers(1, 40)
)
def test_it_is_a_full_sort(q, n, k, seed, chunk):
    queries, keys = whole_numbers(q, 4, seed), whole_numbers(n, 4, seed + 1)
    with using(chunk=chunk):
        got = top_k(queries, keys, min(k, n))
    for x, y in zip(got, by_sorting(queries, keys, min(k, n)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tile", [(2, 3), (5, 2), (3, 3)])
def test_nobody_is_its_own_neighbour_in_tiles_of_any_shape(tile, monkeypatch):
    monkeypatch.setattr(nearest, "tile_shape", lambda *_: tile)
    keys = whole_numbers(11, 4, 0)
    values, rows = top_k(keys, keys, 4, exclude_self=True)
    want_values, want_rows = by_sorting(keys, keys, 4, torch.arange(11))
    assert torch.equal(rows, want_rows)
    assert torch.equal(values, want_values)


def one_rank(sizes, k, chunk, exclude_self):
    """Ranks hold different numbers of keys; without exclude_self also other numbers of queries."""
    keys = whole_numbers(sum(sizes), 4, 0)
    first = sum(sizes[: rank()])
    own = slice(first, first + sizes[rank()])
    queries = keys[own] if exclude_self else whole_numbers(2 * rank(), 4, 5 + rank())
    with using(chunk=chunk):
        got = top_k(queries, keys[own], k, exclude_self=exclude_self)
    want = by_sorting(queries, keys, k, torch.arange(own.start, own.stop) if exclude_self else None)
    assert len(sizes) == world_size()
    return all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("sizes", [(5, 3), (4, 0, 7)])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_ranks_with_different_numbers_of_keys(ranks, sizes, exclude_self):
    for k, chunk in ((1, 2), (6, 3), (4, "auto")):
        assert all(ranks(len(sizes), one_rank, sizes, k, chunk, exclude_self))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k: expected 1 to 3"),
        ({"k": 4}, "k: expected 1 to 3"),
        ({"k": 3, "exclude_self": True}, "k: expected 1 to 2"),
        ({"keys": torch.ones(3, 5)}, "keys: expected"),
        ({"keys": torch.ones(4, 2), "exclude_self": True}, "exclude_self: expected as many queries as keys"),
    ],
)
def test_mistakes_are_named(arguments, message):
    right = {"queries": torch.ones(3, 2), "keys": torch.ones(3, 2), "k": 1}
    with pytest.raises(ValueError, match=message):
        top_k(**(right | arguments))
