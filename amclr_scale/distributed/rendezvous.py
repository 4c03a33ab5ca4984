"""All ranks meet before they send each other anything: in a bounded time, with words about who has not come, and why.

They meet in a store (TCP; rank 0 serves it at MASTER_ADDR:MASTER_PORT, or torchrun's agent does). Each rank leaves its
host's name there; rank 0, when it has seen all of them, leaves the list. A rank that has met a mistake on its way
leaves that instead, and all that come end with it.
"""

import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from amclr_scale.distributed.launcher import RankInfo, where
from amclr_scale.distributed.network import VARIABLES, about, check_interfaces, interfaces, own_address
from amclr_scale.distributed.network import is_loopback as loopback
from amclr_scale.errors import AbsentError, AgreedError, UserError

MINUTES = 5.0
SAID = 10.0  # seconds between two lines about who is waited for
TOLD = 30.0  # seconds that a store is kept for others to read why this rank ends
_SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # what SLURM calls a job that is a shell
_HERE, _ABSENT, _ALL, _FAILED, _READ = "here {}", "absent", "all", "failed", "read"


@dataclass(frozen=True)
class Present:
    """What each rank leaves for the others; `address` is what gloo would give out, "" where an interface is named."""

    host: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # so that it knows its own run's list
    address: str = field(default_factory=lambda: "" if os.environ.get(VARIABLES["gloo"]) else own_address())
    interfaces: list[str] = field(default_factory=interfaces)


def _open(rank_info: RankInfo, seconds: float) -> Any:
    """The store, served by this process if it is rank 0's turn."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch documents it, and forgot to export it
    store = make_store(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank_info.world_size,
        is_master=rank_info.rank == 0 and not agent, wait_for_workers=False, multi_tenant=True,
        timeout=timedelta(seconds=max(1.0, seconds)),
    )  # fmt: skip
    names = (
        "TORCHELASTIC_RUN_ID",
        "TORCHELASTIC_RESTART_COUNT",
        "SLURM_JOB_ID",
        "SLURM_STEP_ID",
        "SLURM_RESTART_COUNT",
    )
    prefixed: Any = dist.PrefixStore  # type: ignore[attr-defined]
    return prefixed("/".join(["amclr_scale", *(os.environ.get(name, "") for name in names)]), store)


def _serves(rank_info: RankInfo) -> bool:
    """Whether the store may go when this process does."""
    return rank_info.rank == 0 or (
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_RANK") == "0"
    )


def _linger(store: Any, rank_info: RankInfo, absent: int = 0, seconds: float = TOLD) -> None:
    """Note that this rank knows why all end; the one whose end takes the store along waits for the others to.

    Args:
        absent: ranks that are not expected any more.
    """
    store.add(_READ, 1)
    until = time.monotonic() + seconds
    while _serves(rank_info) and store.add(_READ, 0) < rank_info.world_size - absent and time.monotonic() < until:
        time.sleep(0.2)


def tell_others(rank_info: RankInfo, words: str, code: int = 2, seconds: float = TOLD) -> None:
    """A rank that ends before it has met the others tells them why, wherever they wait; it gives them some time.

    Where one launcher has started all ranks on one node it does nothing: the launcher ends them.

    Args:
        words: the mistake.
        code: exit code for the others.
        seconds: to reach the store, and then to be read.
    """
    one_node = rank_info.local_world_size == rank_info.world_size
    if rank_info.world_size == 1 or (one_node and {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"} & os.environ.keys()):
        return
    with suppress(RuntimeError, ValueError, KeyError):  # nobody to tell: all that could be done
        store = _open(rank_info, seconds)
        if not store.check([_FAILED]):
            store.set(_FAILED, f"{code} rank {rank_info.rank} ({platform.node()}): {words}")
        _linger(store, rank_info, seconds=seconds)


@contextmanager
def told_while_joining(
    rank_info: RankInfo, minutes: float = MINUTES, every: float = SAID, absent: Sequence[int] = ()
) -> Iterator[None]:
    """Say that this rank waits for others, if it has to, and end it when that has taken too long.

    Args:
        rank_info: this process among the others.
        minutes: after which it ends, wherever it waits.
        every: seconds between two lines.
        absent: ranks that have not come; may change meanwhile.

    Raises:
        UserError: rank 0's port is taken.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT")
    joined, began = threading.Event(), time.monotonic()
    shell = ""
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") in _SHELLS:
        shell = "; started from an interactive srun shell? It holds one of the tasks: put srun before the command"

    def tell() -> None:
        while not joined.wait(every):
            waited = time.monotonic() - began
            who = f"the other {rank_info.world_size - 1} of {rank_info.world_size} ranks"
            if absent:
                who = f"{where(absent)} of {rank_info.world_size}"
            if rank_info.rank == 0 or rank_info.local_rank == 0:
                print(
                    f"rank {rank_info.rank} has waited {waited:.0f} s for {who} to come to {host}:{port}"
                    f"{about(host)}{shell}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            if waited > 60 * minutes + every:  # asleep in a call that knows no limit
                print(f"rank {rank_info.rank} ends: {late(minutes)}", file=sys.stderr, flush=True)
                os._exit(1)

    thread = threading.Thread(target=tell, name="joining", daemon=True)
    if rank_info.world_size > 1:
        thread.start()
    try:
        yield
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT: expected a free port on {host}, got {port}, on which another program listens, perhaps "
                "another run; choose another (deepspeed --master_port N, torchrun --master-port N, else MASTER_PORT=N)"
            ) from error
        raise AbsentError(f"{host}:{port} does not answer within {minutes:g} minutes{about(host)}") from error
    finally:
        joined.set()
        if thread.is_alive():
            thread.join()


def late(minutes: float) -> str:
    """Words for a rank that has waited for so long."""
    return f"not all ranks have met within {minutes:g} minutes (run.rendezvous_minutes)"


def meet(
    rank_info: RankInfo,
    backend: str,
    minutes: float = MINUTES,
    absent: list[int] | None = None,
    gloo_too: bool = False,
) -> tuple[Any, list[str]]:
    """Wait until all ranks are here.

    Args:
        rank_info: this process among the others.
        backend: gloo or nccl, whose interfaces are checked.
        minutes: to wait.
        absent: kept up to date with the ranks that are waited for.
        gloo_too: whether a group over gloo will be made beside it.

    Returns:
        The store, and the host of every rank.

    Raises:
        AgreedError: a rank has met a mistake before it came, or a node gives out an address that others cannot reach.
        AbsentError: some have not come in time.
        UserError: an interface that is named does not exist.
    """
    for name in {backend, "gloo"} if gloo_too else {backend}:
        check_interfaces(name)
    world, until = rank_info.world_size, time.monotonic() + 60 * minutes
    absent = [] if absent is None else absent
    store, mine = _open(rank_info, 60 * minutes), Present(platform.node())
    store.set(_HERE.format(rank_info.rank), json.dumps(mine.__dict__))
    absent[:], pause, everyone = range(world), 0.05, list[Present]()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        while not everyone:
            if store.check([_FAILED]):
                _end_with(store, rank_info)
            late_now = time.monotonic() > until
            absent[:] = _who_is_absent(store, rank_info, absent, looks=late_now)
            if rank_info.rank == 0 and not absent:
                store.set(_ALL, json.dumps([json.loads(store.get(_HERE.format(rank))) for rank in range(world)]))
            if store.check([_ALL]):
                found = [Present(**one) for one in json.loads(store.get(_ALL))]
                if len(found) == world and found[rank_info.rank].token == mine.token:  # else another run's
                    everyone = found
                    break
            if late_now:
                words = (
                    f"{late(minutes)}: {where(absent)} of {world} did not come to {place}" if absent else late(minutes)
                )
                store.set(_FAILED, f"1 {words}")
                _end_with(store, rank_info, len(absent))
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise AbsentError(f"{place} does not answer any more: rank 0 or its launcher has ended") from error
    try:
        check_reachable(everyone, "gloo" if gloo_too else backend)
    except AgreedError:
        _linger(store, rank_info)
        raise
    store.set_timeout(
        default_pg_timeout
    )  # from here on it is the group's: a rank may compile for longer than `minutes`
    return store, [one.host for one in everyone]


def _who_is_absent(store: Any, rank_info: RankInfo, known: Sequence[int], looks: bool) -> list[int]:
    """The ranks that have not come. Rank 0 looks and tells the others: if all did, W ranks would ask W^2 times.

    Args:
        known: that had not come before.
        looks: another rank looks as well.
    """
    if rank_info.rank and not looks:
        return list(json.loads(store.get(_ABSENT))) if store.check([_ABSENT]) else list(known)
    absent = [rank for rank in known if not store.check([_HERE.format(rank)])]
    if rank_info.rank == 0:
        store.set(_ABSENT, json.dumps(absent))
    return absent


def _end_with(store: Any, rank_info: RankInfo, absent: int = 0) -> None:
    code, _, words = store.get(_FAILED).decode().partition(" ")
    _linger(store, rank_info, absent)
    raise AgreedError(words) if code == "2" else AbsentError(words)


def check_reachable(everyone: Sequence[Present], backend: str) -> None:
    """Raise `AgreedError` where gloo would have other nodes connect to a loopback address."""
    hosts = [one.host for one in everyone]
    variable = VARIABLES[backend]
    if backend != "gloo" or len(set(hosts)) == 1:
        return
    lines = []
    for host in dict.fromkeys(one.host for one in everyone if one.address and loopback(one.address)):
        ranks = [rank for rank, one in enumerate(everyone) if one.host == host]
        one = everyone[ranks[0]]
        named = " or ".join(f"{variable}={name}" for name in one.interfaces) or variable
        lines.append(
            f"{variable}: {host} is called {one.address} on itself ({where(ranks)}), where no other node reaches it; "
            f"set {named} there, or give it its network address in its /etc/hosts"
        )
    if lines:
        raise AgreedError("\n".join(lines))
