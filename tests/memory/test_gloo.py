"""What gloo's threads hold for a moment longer counts for nobody: exchanges are over when a tracked call returns."""

import time

import torch
import torch.distributed as dist

from amclr_scale.memory.measured.gloo import WaitingTracker


def _exchange(times: int) -> list[int]:
    """Bytes that are counted after each exchange of a buffer that nobody keeps."""
    counted = []
    with WaitingTracker() as tracker:
        for _ in range(times):
            dist.all_reduce(torch.ones(50_000))
            counted.append(tracker.total)
    return counted


def test_an_exchanged_buffer_is_gone_when_its_last_reference_is(ranks):
    assert ranks(2, _exchange, 100) == [[0] * 100] * 2


def _late_partner() -> tuple[bool, float]:
    """Whether a call that need not wait has waited, and what it brought, where the other rank comes later."""
    x = torch.full((1000,), 1.0 + dist.get_rank())
    dist.barrier()
    if dist.get_rank() == 1:
        time.sleep(0.3)
    with WaitingTracker():
        work = dist.all_reduce(x, async_op=True)
        assert work is not None
        over = work.is_completed()
        work.wait()
    return over, float(x.sum())


def test_a_collective_is_over_when_its_call_returns(ranks):
    assert ranks(2, _late_partner) == [(True, 3000.0)] * 2


def _pass_on() -> float:
    """Both ranks send before they receive, as in a ring."""
    rank, got = dist.get_rank(), torch.zeros(200_000)
    with WaitingTracker():
        sent = dist.isend(torch.full((200_000,), float(rank)), 1 - rank)
        dist.recv(got, 1 - rank)
        assert sent is not None
        sent.wait()
    return float(got[-1])


def test_sends_are_not_waited_for(ranks):
    assert ranks(2, _pass_on) == [1.0, 0.0]
