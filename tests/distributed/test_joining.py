"""Ranks meet in a bounded time, and say who is missing and why; here they are threads of one process."""

import re
import socket
import threading
import time

import psutil
import pytest
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from amclr_scale.distributed import rendezvous
from amclr_scale.distributed.announcing import Waiting
from amclr_scale.distributed.launcher import RankInfo, free_port, read_rank_info, when_runner_ends
from amclr_scale.distributed.network import about, check_interfaces, is_loopback
from amclr_scale.distributed.process_group import start
from amclr_scale.distributed.rendezvous import Present, meet, tell_others, told_while_joining
from amclr_scale.errors import AbsentError, AgreedError, UserError


@pytest.fixture
def address(monkeypatch):
    """Where the ranks of a test meet."""
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    return f"127.0.0.1:{rendezvous.os.environ['MASTER_PORT']}"


def together(*acts):
    """What each act returns or raises, run at the same time."""
    found = [None] * len(acts)

    def run(number, act):
        try:
            found[number] = act()
        except (UserError, AbsentError) as error:
            found[number] = error

    threads = [threading.Thread(target=run, args=one) for one in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def coming(rank, world=3, minutes=1.0):
    return lambda: meet(RankInfo(rank, 0, world, 1), "gloo", minutes)


def test_waiting_for_others_is_said(monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    waiting = Waiting([1, 2, 3])
    with told_while_joining(RankInfo(0, 0, 4, 4), every=0.1, waiting=waiting):
        time.sleep(0.3)
        waiting.absent[:], waiting.words = [2], "rank 2 (node2): 7 shards indexed"
        time.sleep(0.2)
    lines = capfd.readouterr().err.splitlines()
    assert re.match(r"rank 0 has waited 0 s for ranks 1-3 of 4 to come to 127.0.0.1:29500; 127.0.0.1 is", lines[0])
    assert "which no other node reaches" in lines[0]
    assert "for rank 2 of 4 to come to 127.0.0.1:29500; rank 2 (node2): 7 shards indexed" in lines[-1]
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    with told_while_joining(RankInfo(0, 0, 4, 4), every=0.05):
        time.sleep(0.2)
    said = capfd.readouterr().err
    assert "for the other 3 of 4 ranks to come" in said
    assert "started from an interactive srun shell?" in said
    with told_while_joining(RankInfo(1, 1, 4, 4), every=0.05):  # one voice per node
        time.sleep(0.1)
    with told_while_joining(RankInfo(), every=0.05):
        time.sleep(0.1)
    assert not capfd.readouterr().err


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        told = rf"^MASTER_PORT: expected a free port on 127.0.0.1, got {port}, on which"
        with pytest.raises(UserError, match=told), told_while_joining(RankInfo(0, 0, 2, 2)):
            dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_a_port_that_is_taken_where_there_is_one_rank(monkeypatch):
    """As `deepspeed` beside another run of it: both have its default port."""
    import deepspeed

    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for name, value in {**names, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: dist.TCPStore("127.0.0.1", port, 1, True))
        with pytest.raises(UserError, match=rf"^MASTER_PORT: expected a free port on 127.0.0.1, got {port}"):
            start(RankInfo())


def test_a_launcher_that_is_hidden_from_this_user_is_not_watched(monkeypatch):
    """As where /proc is mounted with hidepid and srun's daemon is root's."""

    def hidden(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", hidden)
    before = threading.active_count()
    when_runner_ends(print)
    assert threading.active_count() == before


@pytest.mark.parametrize("rank", ["2", "-1"])
def test_a_rank_that_is_none_of_them(rank):
    """Ranks that are counted from 1 would be waited for."""
    with pytest.raises(UserError, match=rf"^RANK: expected 0 to WORLD_SIZE - 1 = 1, got {rank}$"):
        read_rank_info({"RANK": rank, "WORLD_SIZE": "2"})


def test_all_that_come_meet_and_know_one_another_s_hosts(address, monkeypatch):
    hosts = iter(("node1", "node2", "node2"))
    monkeypatch.setattr(rendezvous.platform, "node", lambda: next(hosts))
    found = together(*map(coming, range(3)))
    assert sorted(found[0][1]) == ["node1", "node2", "node2"]
    assert found[0][1] == found[1][1] == found[2][1]
    assert {store.timeout for store, _ in found} == {default_pg_timeout}  # not that of meeting


def test_only_rank_0_looks_for_each_of_the_others(address, monkeypatch):
    """If each did, a thousand ranks would ask a million times a second."""
    asked, make_store = [], rendezvous.open_store

    class Counting:
        def __init__(self, rank_info, seconds):
            self.rank, self.store = rank_info.rank, make_store(rank_info, seconds)

        def check(self, keys):
            asked.append((self.rank, keys[0]))
            return self.store.check(keys)

        def __getattr__(self, name):
            return getattr(self.store, name)

    monkeypatch.setattr(rendezvous, "open_store", Counting)
    found = together(*map(coming, range(3)))
    assert all(len(hosts) == 3 for _, hosts in found)
    assert {rank for rank, key in asked if key.startswith("here")} == {0}
    assert {rank for rank, _ in asked} == {0, 1, 2}


def test_those_that_do_not_come_are_named_in_time(address, monkeypatch):
    began = time.monotonic()
    found = together(coming(0, 4, minutes=0.02), coming(2, 4, minutes=0.2))
    assert time.monotonic() - began < 10
    for error in found:
        assert isinstance(error, AbsentError)
        assert f"within 0.02 minutes (run.rendezvous_minutes): ranks 1, 3 of 4 did not come to {address}" in str(error)
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    alone = RankInfo(1, 0, 2, 1)  # rank 0 does not come
    with pytest.raises(AbsentError, match=r"does not answer"), told_while_joining(alone, 0.01):
        meet(alone, "gloo", 0.01)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_mistake_before_joining_is_told_to_those_that_wait(address, failing):
    """Also where it is rank 0, in which they meet, and where they come later than it has failed."""
    mistake = "data.train: no such file"
    acts = [coming(rank) for rank in range(3)]
    acts[failing] = lambda: tell_others(RankInfo(failing, 0, 3, 1), mistake)
    late = acts[2]
    acts[2] = lambda: (time.sleep(0.5), late())
    began = time.monotonic()
    found = together(*acts)
    assert time.monotonic() - began < 10
    for rank in {0, 1, 2} - {failing}:
        assert isinstance(found[rank], AgreedError)
        assert re.fullmatch(rf"rank {failing} \(.+\): {mistake}", str(found[rank]))


def test_a_failure_that_is_no_mistake_is_none_on_the_others_either(address):
    _, error, _ = together(lambda: tell_others(RankInfo(0, 0, 2, 1), "MemoryError: ", 1), coming(1, 2), lambda: None)
    assert isinstance(error, AbsentError)
    assert "MemoryError" in str(error)


def test_a_loopback_address_is_told_before_anybody_connects_to_it(monkeypatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    here = Present("node1", address="127.0.1.1", interfaces=["eth0", "ib0"])
    there = Present("node2", address="10.0.0.2", interfaces=["eth0"])
    with pytest.raises(AgreedError) as told:
        rendezvous.check_reachable([here, here, there], "gloo")
    assert str(told.value).startswith("GLOO_SOCKET_IFNAME: node1 is called 127.0.1.1 on itself (ranks 0-1), where no")
    assert "set GLOO_SOCKET_IFNAME=eth0 or GLOO_SOCKET_IFNAME=ib0 there" in str(told.value)
    rendezvous.check_reachable([here, here], "gloo")  # one node
    rendezvous.check_reachable([here, there], "nccl")  # which looks for interfaces itself
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert Present("node1").address == ""
    rendezvous.check_reachable([Present("node1"), there], "gloo")


def test_interfaces_and_names_that_are_not_there():
    for backend, named in (("gloo", "lo"), ("nccl", "^docker"), ("nccl", "lo"), ("nccl", "l"), ("nccl", "=lo,ib")):
        check_interfaces(backend, {f"{backend.upper()}_SOCKET_IFNAME": named})
    for backend, named in (("gloo", "ib7"), ("gloo", "lo,ib7"), ("nccl", "ib7"), ("nccl", "=l")):
        with pytest.raises(UserError, match=rf"^{backend.upper()}_SOCKET_IFNAME: expected an interface of .*lo.*, got"):
            check_interfaces(backend, {f"{backend.upper()}_SOCKET_IFNAME": named})
    assert "has no address here" in about("no.such.host.invalid")
    assert is_loopback("127.0.1.1")
    assert is_loopback("::1")
    assert not is_loopback("10.0.0.1")


def test_ranks_on_a_node_are_counted_where_the_launcher_does_not_say():
    by_hand = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert read_rank_info(by_hand) == RankInfo(1, 1, 4, 4, counted=False)
    assert read_rank_info(by_hand | {"LOCAL_WORLD_SIZE": "2"}) == RankInfo(1, 1, 4, 2, counted=True)
    slurm = {"SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"}
    assert read_rank_info(slurm | {"SLURM_STEP_TASKS_PER_NODE": "2,1"}) == RankInfo(2, 0, 3, 2, counted=False)
    assert read_rank_info(slurm | {"SLURM_STEP_TASKS_PER_NODE": "1(x3)"}).counted
