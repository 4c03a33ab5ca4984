"""The tracker counts storages: once each, from their first operation to their last reference."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from amclr_scale.memory.tracker import Tracker


def test_views_are_counted_once_and_end_with_their_last_reference():
    with Tracker() as tracker:
        x = torch.zeros(100)
        row = x.view(10, 10)[3]
        assert tracker.total == 400
        del x
        assert tracker.total == 400
        del row
        assert tracker.total == 0
    assert tracker.peak == 400


def test_what_was_there_before_is_found_not_new():
    before = torch.zeros(50)
    with Tracker() as tracker:
        tracker.label = "new"
        before.add_(1)
        after = before + 1
    assert tracker.live == {"found": 200, "new": 200}
    assert after.numel() == 50


def test_storages_that_outputs_resize_in_place():
    out = torch.empty(0)
    with Tracker() as tracker:
        torch.add(torch.ones(10), 1, out=out.resize_(10))
        out.resize_(1000)
        assert tracker.total == 4000


def test_backward_and_recomputation_are_seen():
    weight = torch.ones(64, 64, requires_grad=True)
    with Tracker() as tracker:
        tracker.add([weight], "weight")
        tracker.label = "forward"
        x = checkpoint(lambda w: (w @ w).relu().square(), weight, use_reentrant=False).sum()
        kept = tracker.live["forward"]
        tracker.label = "backward"
        tracker.reset_peak()
        x.backward()
        assert kept == 4  # the sum alone: the block is made again
        assert tracker.at_peak["backward"] >= 3 * 64 * 64 * 4
        assert tracker.live["backward"] == 64 * 64 * 4  # the gradient
    assert weight.grad is not None


def test_labels_may_be_set_later_and_peaks_begin_again():
    with Tracker() as tracker:
        x = torch.zeros(10)
        y = torch.zeros(20)
        tracker.add([x], "kept")
        assert tracker.live == {"new": 80, "kept": 40}
        del y
        tracker.reset_peak()
        assert (tracker.peak, tracker.total) == (40, 40)


def test_meta_tensors_have_sizes_and_no_memory():
    with Tracker("meta") as tracker:
        x = torch.empty(10**12, device="meta")
        y = x + 1
        assert tracker.total == 8 * 10**12
        torch.zeros(10)  # elsewhere
        assert tracker.total == 8 * 10**12
    assert y.shape == x.shape


def test_sizes_of_some_tensors_count_storages_once():
    x = torch.zeros(10)
    assert Tracker().size_of([x, x[2:], torch.zeros(5)]) == pytest.approx(60)
