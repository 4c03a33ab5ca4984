"""The order of samples: every visit once, the same for every number of ranks, at any position at once."""

import tracemalloc
from collections import Counter
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amclr_scale.data.order import Order
from amclr_scale.errors import UserError

EPOCHS = 3


def first_ids(sizes):
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


@st.composite
def orders(draw):
    """Shards of any size, some empty or of one sample, and at most as many lanes as samples."""
    sizes = draw(st.lists(st.integers(0, 12), min_size=1, max_size=8).filter(lambda s: sum(s) > 0))
    lanes = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 12) if n <= sum(sizes)]))
    return Order(first_ids(sizes), seed=draw(st.integers(0, 99)), lanes=lanes, window=draw(st.integers(1, 4)))


@settings(deadline=None, max_examples=100)
@given(orders(), st.integers(1, 3))
def test_every_visit_once_and_only_the_remainder_is_carried(order, m):
    n = int(order.samples_per_epoch)
    steps = -(-order.lane_begin(EPOCHS) // m)
    visits = Counter()
    for step in range(steps):
        batch = order.batch(step, m * order.lanes)
        visits.update(zip(batch.passes.tolist(), batch.ids.tolist(), strict=True))
    assert set(visits.values()) == {1}
    for epoch in range(EPOCHS - 1):
        assert {i for number, i in visits if number == epoch} == set(range(n))
    last = sum(number == EPOCHS - 1 for number, _ in visits)
    assert last > n - order.lanes


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(1, 5), st.integers(0, 40))
def test_ranks_share_the_same_global_batch(order, m, step):
    whole = order.batch(step, m * order.lanes)
    for world_size in (w for w in range(1, order.lanes + 1) if order.lanes % w == 0):
        parts = [order.batch(step, m * order.lanes, rank, world_size) for rank in range(world_size)]
        assert len({len(part) for part in parts}) == 1
        np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), whole.ids)
        np.testing.assert_array_equal(np.concatenate([part.passes for part in parts]), whole.passes)


@settings(deadline=None, max_examples=40)
@given(orders(), st.integers(1, 3), st.integers(0, 25), st.integers(1, 40))
def test_last_visits_are_those_of_the_steps_before(order, m, step, look_back):
    B, N = m * order.lanes, int(order.samples_per_epoch)
    want = {}
    for number in range(step):
        want |= dict.fromkeys(order.batch(number, B).ids.tolist(), number)
    ids = np.random.default_rng(step).permutation(N)[: 1 + N // 2]
    with mock.patch("amclr_scale.data.order._LOOK_BACK", look_back):
        got = order.last_visits(ids, step, B)
    assert got.tolist() == [want.get(i, -1) for i in ids.tolist()]


@settings(deadline=None, max_examples=60)
@given(orders(), st.integers(0, 60), st.integers(0, 30))
def test_a_position_is_reached_at_once(order, start, length):
    """A fresh order, asked for the middle, gives what one that came the whole way gives."""
    fresh = Order.__new__(Order)
    fresh.__setstate__(order.__getstate__())
    lane = order.lanes - 1
    whole = order.visits(lane, 0, start + length)
    np.testing.assert_array_equal(fresh.visits(lane, start, start + length).ids, whole.ids[start:])


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(sum), min_size=1, max_size=3),
    st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.3, 3.0]), min_size=3, max_size=3),
)
def test_a_mixture_passes_over_each_data_set_as_often_as_it_weighs(parts, weights):
    weights = weights[: len(parts)]
    sizes = [sum(part) for part in parts]
    if sum(w * n for w, n in zip(weights, sizes, strict=True)) < 2 + len(parts):
        return
    order = Order(
        first_ids([n for part in parts for n in part]), seed=1, lanes=2, window=2,
        parts=[len(part) for part in parts], weights=weights,
    )  # fmt: skip
    epochs = 7
    visits = Counter()
    for lane in range(2):
        found = order.visits(lane, 0, order.lane_begin(epochs))
        visits.update(zip(found.passes.tolist(), found.ids.tolist(), strict=True))
    assert set(visits.values()) == {1}
    bounds = first_ids(sizes)
    for k, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        seen = [(number, i) for number, i in visits if bounds[k] <= i < bounds[k + 1]]
        assert abs(len(seen) - epochs * weight * size) < 1 + 2  # rounding, and what is carried on
        times = [sum(i == sample for _, i in seen) for sample in range(bounds[k], bounds[k + 1])]
        assert max(times) - min(times) <= 2  # one pass is under way, another may wait among the carried


def test_lanes_cross_into_an_epoch_at_the_same_step():
    order = Order(first_ids([7, 5, 1]), seed=0, lanes=4, window=1)
    for epoch in range(9):
        assert order.lane_begin(epoch) == epoch * 13 // 4
        for position in range(order.lane_begin(epoch), order.lane_begin(epoch + 1)):
            assert order.epoch_at(position) == epoch


def test_epochs_and_seeds_differ():
    order, other = (Order(first_ids([50] * 10), seed=seed, lanes=2, window=3) for seed in (0, 1))
    first, second = order.visits(0, 0, 250).ids, order.visits(0, 250, 500).ids
    assert (first != second).mean() > 0.9
    assert (first != other.visits(0, 0, 250).ids).mean() > 0.9


def test_positions_of_a_sample_are_spread_over_the_epoch():
    """Over many epochs a sample's place is uniform: over lanes, and within one."""
    order = Order(first_ids([25] * 16), seed=0, lanes=4, window=2)
    places = np.zeros((400, 400))
    for epoch in range(400):
        for lane in range(4):
            ids = order.visits(lane, order.lane_begin(epoch), order.lane_begin(epoch + 1)).ids
            places[ids, lane * 100 + np.arange(100)] += 1
    quarters = places.reshape(400, 16, 25).sum(2)  # (ids, sixteenths of the epoch), 25 expected
    assert abs(quarters.std() - 25**0.5 * (15 / 16) ** 0.5) < 0.2


def test_neighbours_in_a_shard_are_no_neighbours_in_a_batch():
    """A batch draws from every lane's window, so pairs of one shard meet about as often as chance has it."""
    order = Order(first_ids([100] * 64), seed=0, lanes=8, window=8)
    same = [0, 0]
    for step in range(order.lane_begin(4) // 8):
        shard = order.batch(step, 64).ids // 100
        same[0] += sum(int(c * (c - 1)) for c in np.bincount(shard))
        same[1] += 64 * 63
    uniform = 99 / 6399
    assert 0.5 * uniform < same[0] / same[1] < 1.6 * uniform


def test_more_lanes_than_samples_is_refused():
    with pytest.raises(UserError, match=r"data\.lanes: expected at most as many lanes"):
        Order(first_ids([3, 2]), seed=0, lanes=6, window=1)


def test_weights_without_a_data_set_are_refused():
    with pytest.raises(UserError, match=r"data\.weights: expected one number for each of the 1 names"):
        Order(first_ids([3, 2]), seed=0, lanes=1, window=1, weights=[1.0, 2.0])


def test_a_lane_is_cut_out_of_very_many_shards_without_going_through_them():
    """Its windows take what its own shards take, however many others there are."""
    order = Order(first_ids([100] * 50_000), seed=0, lanes=1000, window=4)
    order.visits(0, 0, 1), order.visits(0, order.lane_begin(1), order.lane_begin(1) + 1)  # what is made once per epoch
    tracemalloc.start()
    for lane in (1, 500, 999):
        for epoch in (0, 1):
            order.visits(lane, order.lane_begin(epoch), order.lane_begin(epoch) + 1)
    assert tracemalloc.get_traced_memory()[1] < 300_000  # one array of all shards has 400,000
    tracemalloc.stop()
