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

from amclr_scale.distributed.announcing import Announcer, Progress, Waiting
from amclr_scale.distributed.launcher import RankInfo, export, where
from amclr_scale.distributed.network import VARIABLES, about, check_interfaces, handed_over, interfaces, own_address
from amclr_scale.distributed.network import is_loopback as loopback
from amclr_scale.errors import AbsentError, AgreedError, UserError

MINUTES = 5.0
LONGEST = 120.0  # minutes
SAID = 10.0  # seconds between two lines about who is waited for
TOLD = 30.0  # seconds that a store is kept for others to read why this rank ends
BOUND = 5.0  # seconds in which rank 0 knows whether its port is free
HEARD = 5.0  # seconds in which what rank 0 has seen of a third rank reaches the others
_SHELLS = ("bash", "sh", "zsh", "fish", "interactive")  # what SLURM calls a job that is a shell
_HERE, _ABSENT, _ALL, _FAILED, _READ = "here {}", "absent", "all", "failed", "read"


@dataclass(frozen=True)
class Present:
    """What each rank leaves for the others; `address` is what gloo would give out, "" where an interface is named."""

    host: str
    token: str = field(default_factory=lambda: uuid.uuid4().hex)  # so that it knows its own run's list
    address: str = field(default_factory=lambda: "" if os.environ.get(VARIABLES["gloo"]) else own_address())
    interfaces: list[str] = field(default_factory=interfaces)


def open_store(rank_info: RankInfo, seconds: float) -> Any:
    """The store, served by this process if it is rank 0's turn."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listens = handed_over(int(os.environ["MASTER_PORT"])) if rank_info.rank == 0 else None
    make_store: Any = dist.TCPStore  # type: ignore[attr-defined]  # torch documents it, and forgot to export it
    store = make_store(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), rank_info.world_size,
        is_master=rank_info.rank == 0 and not agent, wait_for_workers=False, multi_tenant=True,
        master_listen_fd=listens, timeout=timedelta(seconds=max(1.0, seconds)),
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


def announce(rank_info: RankInfo, minutes: float = MINUTES) -> Announcer:
    """Say from now on what this rank prepares, to those that wait for it; `meet` takes the store that it has opened.

    Args:
        minutes: that rank 0 is waited for.

    Raises:
        UserError: nobody says where they meet, or the port is taken.
    """
    if rank_info.world_size > 1:
        export(rank_info)
    announcer = Announcer(rank_info, lambda: open_store(rank_info, 60 * minutes))
    if rank_info.rank == 0:
        with told_while_joining(rank_info, minutes):  # not only when all is prepared
            announcer.check(BOUND)
    return announcer


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
        store = open_store(rank_info, seconds)
        if not store.check([_FAILED]):
            store.set(_FAILED, f"{code} rank {rank_info.rank} ({platform.node()}): {words}")
        _linger(store, rank_info, seconds=seconds)


@contextmanager
def told_while_joining(
    rank_info: RankInfo, minutes: float = MINUTES, every: float = SAID, waiting: Waiting | None = None
) -> Iterator[None]:
    """Say that this rank waits for others, if it has to, and end it when that has taken too long.

    Args:
        rank_info: this process among the others.
        minutes: after which it ends, wherever it waits, unless the others are seen to get on.
        every: seconds between two lines.
        waiting: what is known of those that have not come; may change meanwhile.

    Raises:
        UserError: rank 0's port is taken.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT")
    joined, began, waiting = threading.Event(), time.monotonic(), waiting or Waiting()
    shell = ""
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") in _SHELLS:
        shell = "; started from an interactive srun shell? It holds one of the tasks: put srun before the command"

    def tell() -> None:
        while not joined.wait(every):
            waited = time.monotonic() - began
            who = f"the other {rank_info.world_size - 1} of {rank_info.world_size} ranks"
            if waiting.absent:
                who = f"{where(waiting.absent)} of {rank_info.world_size}"
            doing = f"; {waiting.words}" if waiting.words else about(host)
            if rank_info.rank == 0 or rank_info.local_rank == 0:
                print(
                    f"rank {rank_info.rank} has waited {waited:.0f} s for {who} to come to {host}:{port}"
                    f"{doing}{shell}",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            if time.monotonic() - waiting.moved > 60 * minutes + every:  # asleep in a call that knows no limit
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


def late(minutes: float, longest: float | None = None) -> str:
    """Words for a rank that has waited for so long.

    Args:
        longest: minutes that it has waited for ranks which did get on.
    """
    if longest is not None:
        return f"not all ranks have met within {longest:g} minutes (run.prepare_minutes), though some still prepare"
    return f"not all ranks have met within {minutes:g} minutes (run.rendezvous_minutes)"


def meet(
    rank_info: RankInfo, backend: str, minutes: float = MINUTES, *, longest: float = LONGEST,
    waiting: Waiting | None = None, announcer: Announcer | None = None, gloo_too: bool = False,
) -> tuple[Any, list[str]]:  # fmt: skip
    """Wait until all ranks are here.

    Args:
        rank_info: this process among the others.
        backend: gloo or nccl, whose interfaces are checked.
        minutes: to wait for ranks that are not seen to get on.
        longest: minutes to wait for ranks that are.
        waiting: kept up to date with those that are waited for.
        announcer: has opened the store.
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
    world, began, waiting = rank_info.world_size, time.monotonic(), waiting or Waiting()
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    patience = 60 * minutes + (HEARD if rank_info.rank else 0.0)
    try:
        store, mine = announcer.take() if announcer else open_store(rank_info, 60 * minutes), Present(platform.node())
        store.set(_HERE.format(rank_info.rank), json.dumps(mine.__dict__))
        waiting.absent[:], pause, everyone, progress = range(world), 0.05, list[Present](), Progress()
        waiting.moved = time.monotonic()
        while not everyone:
            if store.check([_FAILED]):
                _end_with(store, rank_info)
            too_long = time.monotonic() - began > 60 * longest
            late_now = too_long or time.monotonic() - waiting.moved > patience
            _look(store, rank_info, waiting, progress, all_of_them=late_now)
            if rank_info.rank == 0 and not waiting.absent:
                store.set(_ALL, json.dumps([json.loads(store.get(_HERE.format(rank))) for rank in range(world)]))
            if store.check([_ALL]):
                found = [Present(**one) for one in json.loads(store.get(_ALL))]
                if len(found) == world and found[rank_info.rank].token == mine.token:  # else another run's
                    everyone = found
                    break
            if late_now or (rank_info.rank == 0 and progress.silent(waiting.absent) > 60 * minutes):
                words, absent = late(minutes, longest if too_long else None), waiting.absent
                if absent:
                    words += f": {where(absent)} of {world} did not come to {place}"
                store.set(_FAILED, f"1 {words}")
                _end_with(store, rank_info, len(absent))
            time.sleep(pause)
            pause = min(1.5 * pause, 1.0)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error) or not waiting.absent:  # it was never reached
            raise
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


def _look(store: Any, rank_info: RankInfo, waiting: Waiting, progress: Progress, all_of_them: bool) -> None:
    """See who has not come. Rank 0 looks and tells the others: if all did, W ranks would ask W^2 times.

    While rank 0 has not come itself, the others look at what it does.

    Args:
        progress: what this rank has seen of the others.
        all_of_them: another rank looks for each as well.
    """
    if rank_info.rank and not all_of_them:
        if store.check([_ABSENT]):
            waiting.hear(json.loads(store.get(_ABSENT)))
        elif progress.look(store, [0]):
            waiting.moved, waiting.words = time.monotonic(), progress.words([0])
        return
    absent = [rank for rank in waiting.absent if not store.check([_HERE.format(rank)])]
    if rank_info.rank == 0:
        moved = progress.look(store, absent)
        said = {"absent": absent, "words": progress.words(absent), "beat": waiting.beat + (moved or waiting.beat < 0)}
        waiting.hear(said)
        store.set(_ABSENT, json.dumps(said))
    else:
        waiting.absent[:] = absent


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
