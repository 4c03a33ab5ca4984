"""Ranks wait for one that still prepares, as long as it gets on; here they are threads of one process."""

import time

import pytest

from amclr_scale.distributed import announcing, rendezvous
from amclr_scale.distributed.announcing import Announcer, Waiting
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.preparing import Work
from amclr_scale.distributed.rendezvous import meet
from amclr_scale.errors import AbsentError, UserError
from tests.distributed.test_joining import address, together

pytestmark = pytest.mark.slow  # they sleep
__all__ = ["address"]
SHORT = 0.6  # seconds that a silent rank is waited for


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(announcing, "BEAT", 0.05)


def coming(rank, prepares=lambda work: None, longest=1.0, world=2, seen=None, ready=True):
    """A rank that prepares before it meets the others; `ready`: that it ever does."""

    def act():
        rank_info, work, waiting = RankInfo(rank, 0, world, 1), Work(), Waiting()
        announcer = Announcer(rank_info, lambda: rendezvous.open_store(rank_info, 20), work)
        prepares(work)
        if not ready:
            announcer._enough.set()
            return None
        if seen is not None:
            seen.append(waiting)
        return meet(rank_info, "gloo", SHORT / 60, longest=longest, waiting=waiting, announcer=announcer)

    return act


def gets_on(seconds, every=0.1):
    def prepares(work):
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            work.advance("shards indexed", 1000)
            time.sleep(every)

    return prepares


def hangs(work):
    """After a while."""
    gets_on(0.3)(work)
    time.sleep(4 * SHORT)


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_gets_on_is_waited_for(address, late):
    """Longer than one that says nothing; also rank 0, which is asked for what it does before it has come."""
    seen, words = [], set()
    acts = [coming(rank, seen=seen) for rank in (0, 1)]

    def prepares(work):
        until = time.monotonic() + 4 * SHORT
        while time.monotonic() < until:
            work.advance("shards indexed", 1000)
            words.update(waiting.words for waiting in seen)
            time.sleep(0.1)

    acts[late] = coming(late, prepares)
    for _, hosts in together(*acts):
        assert len(hosts) == 2
    assert any(said.startswith(f"rank {late} (") and said.endswith(",000 shards indexed") for said in words)


def test_one_that_hangs_while_it_prepares_is_not(address):
    began = time.monotonic()
    error, _ = together(coming(0), coming(1, hangs, ready=False))
    assert isinstance(error, AbsentError)
    assert "not all ranks have met within 0.01 minutes (run.rendezvous_minutes): rank 1 of 2 did not come" in str(error)
    assert SHORT < time.monotonic() - began < 10


def test_one_that_is_silent_is_not_waited_for_while_another_gets_on(address):
    """Unless it is on the same node: it may wait for the other one's index. Here all are."""
    error, _ = together(coming(0, world=3), coming(1, gets_on(3 * SHORT), world=3, ready=False))
    assert isinstance(error, AbsentError)
    assert "ranks 1-2 of 3 did not come" in str(error)


def test_a_second_rank_of_the_node_waits_for_what_the_first_prepares(address):
    """It has said something, and then no more."""

    def waits(work):
        work.advance("shards looked at")
        time.sleep(3 * SHORT)

    found = together(coming(0, world=3), coming(1, gets_on(3 * SHORT), world=3), coming(2, waits, world=3))
    assert [len(one[1]) if isinstance(one, tuple) else str(one) for one in found] == [3, 3, 3]


def test_nobody_waits_for_ever(address):
    error, _ = together(coming(0, longest=SHORT / 60), coming(1, gets_on(4 * SHORT), ready=False))
    assert isinstance(error, AbsentError)
    assert "not all ranks have met within 0.01 minutes (run.prepare_minutes), though some still prepare" in str(error)


def test_a_port_that_is_taken_is_told_when_the_rank_is_ready():
    def taken():
        raise UserError("MASTER_PORT: taken")

    announcer = Announcer(RankInfo(0, 0, 2, 1), taken)
    with pytest.raises(UserError, match="taken"):
        announcer.take()
    assert Announcer(RankInfo(), taken).take() is None  # one rank waits for nobody
