"""Which rank this process is, however it was started: deepspeed, torchrun, srun, mpirun's variables, or plain python.

Imports no torch: the configuration is checked against the number of ranks before anything heavy is loaded.
"""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from amclr_scale.errors import UserError

_LOOK = 1.0  # seconds
SUPERVISED = "AMCLR_SCALE_SUPERVISED"  # set: by a supervisor that starts ranks itself
_OF_ANOTHER_LAUNCHER = ("TORCHELASTIC_", "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT", "GROUP_", "ROLE_")


@dataclass(frozen=True)
class RankInfo:
    """One process among the others."""

    rank: int = 0
    local_rank: int = 0  # on this node
    world_size: int = 1
    local_world_size: int = 1  # processes on this node
    counted: bool = True  # whether the launcher has said how many those are; else they are counted when all have met


def where(ranks: Sequence[int], hosts: Sequence[str] = ()) -> str:
    """`ranks 0-7 (node1), 9 (node2)`: some ranks, and the hosts that they are on.

    Args:
        ranks: in rising order.
        hosts: of all ranks; empty: they are not named.
    """
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1 and (not hosts or hosts[rank] == hosts[spans[-1][0]]):
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    words = [f"{a}-{b}" if a < b else str(a) for a, b in spans]
    named = [f"{span} ({hosts[a]})" if hosts else span for span, (a, _) in zip(words, spans, strict=True)]
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(named)}"


def _first_host(environment: Mapping[str, str]) -> str:
    """The node of rank 0 of a SLURM step."""
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    try:
        names = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(
            f"MASTER_ADDR: expected the address of rank 0's node; scontrol does not tell it ({error}); set it"
        ) from error
    return names.split()[0]


def free_port() -> int:
    """A port of this machine on which nobody listens at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_rank_info(environment: Mapping[str, str] | None = None) -> RankInfo:
    """Read the launcher's variables.

    Raises:
        UserError: some are set and others, which belong to them, are not; or this rank is none of them.
    """
    found = _said(os.environ if environment is None else environment)
    if not 0 <= found.rank < found.world_size:
        raise UserError(f"RANK: expected 0 to WORLD_SIZE - 1 = {found.world_size - 1}, got {found.rank}")
    return found


def _said(env: Mapping[str, str]) -> RankInfo:
    try:
        if "RANK" in env and "WORLD_SIZE" in env:  # deepspeed, torchrun
            world = int(env["WORLD_SIZE"])
            said = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE")
            return RankInfo(int(env["RANK"]), int(env.get("LOCAL_RANK", 0)), world, int(said or world), bool(said))
        if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # srun; a batch script by itself sets no step
            said = env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"])
            tasks_here = int(said.split("(")[0].split(",")[0])  # of the first node, where nodes differ
            rank, local_rank, world = (int(env[f"SLURM_{name}"]) for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS"))
            return RankInfo(rank, local_rank, world, tasks_here, "," not in said)
    except (KeyError, ValueError) as error:
        raise UserError(f"environment: the launcher's variables do not fit together: {error}") from error
    return RankInfo()


def ranks_on_node(environment: Mapping[str, str] | None = None) -> int:
    """How many ranks the launcher started on this node; 1 where it does not say, as without a launcher."""
    env = os.environ if environment is None else environment
    return int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or 1)


def end_with_launcher() -> None:
    """Be sent SIGTERM (Linux) when the launcher dies: without it nobody would end this rank, or see how it ends.

    To be called early: a launcher that is gone already sends nothing.
    """
    if sys.platform == "linux":
        parent, set_parent_death_signal = os.getppid(), 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
        if os.getppid() != parent:  # between the two lines above
            os.kill(os.getpid(), signal.SIGTERM)


def when_runner_ends(tell: Callable[[str], None]) -> None:
    """Call `tell` once, from a thread, when the `deepspeed` command has ended though its ranks have not.

    It hands no signal on to the process that starts the ranks (on one node), which lives on without it.
    """
    import psutil  # here alone: the losses by themselves need torch and nothing else

    if not os.getppid():  # the first process of a container, or one that was sent into it
        return
    try:
        launcher = psutil.Process(os.getppid())
        runner = launcher.parent()
        if runner is None or "deepspeed.launcher.launch" not in launcher.cmdline():
            return
        if not any(word.endswith(("/deepspeed", "/ds", "deepspeed.launcher.runner")) for word in runner.cmdline()):
            return
    except psutil.Error:  # processes of others are hidden here (hidepid), and a launcher of one's own is not
        return

    def watch() -> None:
        while runner.is_running() and runner.status() != psutil.STATUS_ZOMBIE and launcher.ppid() == runner.pid:
            time.sleep(_LOOK)
        tell("the deepspeed command has ended")

    def look() -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # the launcher has gone too, of which the kernel tells
            watch()

    threading.Thread(target=look, name="deepspeed command", daemon=True).start()


def environments(host: str, port: int, world_size: int, first_rank: int, here: int) -> list[dict[str, str]]:
    """What each rank of this node is started with: this process's environment, and who it is among all.

    Args:
        host, port: where rank 0 is met.
        first_rank: of this node.
        here: ranks of this node.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_OF_ANOTHER_LAUNCHER)}
    kept |= {"MASTER_ADDR": host, "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    kept |= {"LOCAL_WORLD_SIZE": str(here), SUPERVISED: "1"}
    return [{**kept, "RANK": str(first_rank + local), "LOCAL_RANK": str(local)} for local in range(here)]


def export(rank_info: RankInfo) -> None:
    """Set the variables that torch.distributed and DeepSpeed read, where the launcher has not.

    Raises:
        UserError: nobody says where rank 0 is, or a port is given that is none.
    """
    os.environ.setdefault("RANK", str(rank_info.rank))
    os.environ.setdefault("LOCAL_RANK", str(rank_info.local_rank))
    os.environ.setdefault("WORLD_SIZE", str(rank_info.world_size))
    os.environ.setdefault("LOCAL_WORLD_SIZE", str(rank_info.local_world_size))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = "127.0.0.1" if rank_info.world_size == 1 else _first_host(os.environ)
    if "MASTER_PORT" not in os.environ:
        job = int(os.environ.get("SLURM_JOB_ID", "0"))
        os.environ["MASTER_PORT"] = str(free_port() if rank_info.world_size == 1 else 20000 + job % 20000)
    port = os.environ["MASTER_PORT"]
    if not port.strip().isdecimal() or int(port) > 65535:
        raise UserError(
            f"MASTER_PORT: expected the number of a port, at most 65535, got {port!r}; set the same one on all ranks"
        )
