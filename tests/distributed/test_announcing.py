"""Ranks wait for one that still prepares, as long as it gets on; here they are threads of one process."""

import socket
import threading
import time

import pytest
import torch.distributed as dist

from amclr_scale.distributed import announcing, rendezvous
from amclr_scale.distributed.announcing import Announcer, Waiting
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.preparing import Work
from amclr_scale.distributed.rendezvous import meet
from amclr_scale.errors import AbsentError, UserError
from tests.distributed.test_joining import address, together

pytestmark = pytest.mark.slow  # they sleep
__all__ = ["address"]
SHORT = 1.8  # seconds that a silent rank is waited for; a busy machine starts a thread late


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(announcing, "BEAT", 0.05)


def coming(rank, prepares=lambda work: None, longest=1.0, world=2, seen=None, ready=True, patience=SHORT):
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
        return meet(rank_info, "gloo", patience / 60, longest=longest, waiting=waiting, announcer=announcer)

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
    assert "not all ranks have met within 0.03 minutes (run.rendezvous_minutes): rank 1 of 2 did not come" in str(error)
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
    assert "not all ranks have met within 0.03 minutes (run.prepare_minutes), though some still prepare" in str(error)


def test_a_port_that_is_taken_is_told_before_anything_is_prepared(address, monkeypatch):
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)  # as the ranks' process would say it from then on
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(address.rpartition(":")[2])))
        taken.listen()
        with pytest.raises(UserError, match=rf"^MASTER_PORT: expected a free port on {address.replace(':', ', got ')}"):
            rendezvous.announce(RankInfo(0, 0, 2, 1))
    rendezvous.announce(RankInfo()).check(0)  # one rank waits for nobody
    assert rendezvous.announce(RankInfo()).take() is None


def test_rank_0_may_start_later_than_it_is_waited_for_while_the_other_prepares(address):
    """Its store is tried again for as long."""
    again, attempts = threading.Event(), []

    def short():
        attempts.append(1)
        if len(attempts) > 1:
            again.set()
        return rendezvous.open_store(RankInfo(1, 0, 2, 1), 1 if len(attempts) == 1 else 20)

    def prepares():
        announcer = Announcer(RankInfo(1, 0, 2, 1), short, Work())
        assert again.wait(15)
        return meet(RankInfo(1, 0, 2, 1), "gloo", 0.2, announcer=announcer)

    def late():
        assert again.wait(15)
        return coming(0, patience=10)()

    for found in together(prepares, late):
        assert len(found[1]) == 2


def test_an_attempt_that_a_ready_rank_begins_is_the_last():
    attempts = []

    def refused():
        attempts.append(announcer._enough.is_set() if attempts else False)
        time.sleep(0.05)
        raise dist.DistNetworkError("no answer")

    announcer = Announcer(RankInfo(1, 0, 2, 1), refused, Work())
    time.sleep(0.2)
    with pytest.raises(dist.DistNetworkError, match="no answer"):
        announcer.take()
    assert len(attempts) > 2
    assert attempts.count(True) <= 1
