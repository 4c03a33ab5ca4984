"""Runs on the two nodes of tools/cluster/nodes.py, started as each launcher would."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tools.cluster.nodes import ROOT, Cluster, Node

BATCH, EVERY, STEPS = 32, 4, 60
PATIENCE = 120.0  # seconds for a run to take its next step
BIN = Path(sys.executable).parent
SCRIPT = "launch/train.py"
QUIET = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GLOO_SOCKET_IFNAME")


def words_of(folder: Path, name: str, watch: float) -> list[str]:
    """The run, whoever starts it."""
    return [
        "--config", "configs/quickstart.yaml", "train.epochs=null", f"train.samples={STEPS * BATCH}",
        f"train.global_batch_size={BATCH}", "evaluation.splits=[]", "run.log_every_steps=1", "execution.threads=1",
        "execution.workers=0", f"checkpoint.every_samples={EVERY * BATCH}", "checkpoint.every_minutes=null",
        f"run.folder={folder}", f"run.name={name}", f"run.watch_minutes={watch / 60}", "resume=auto",
    ]  # fmt: skip


def by_hand(node: Node, port: int) -> tuple[list[str], dict[str, str]]:
    """One process per node; nobody says how many share it."""
    rank = str(node.number - 1)
    where = {"MASTER_ADDR": "node1", "MASTER_PORT": str(port)}
    return [sys.executable], {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": "0", **where}


def by_slurm(node: Node, port: int) -> tuple[list[str], dict[str, str]]:
    """As `srun` starts tasks, with the address that a batch script sets."""
    tasks = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_LOCALID": "0"}
    step = {"SLURM_PROCID": str(node.number - 1), "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    return [sys.executable], {**tasks, **step, "MASTER_ADDR": "node1", "MASTER_PORT": str(port)}


def by_torchrun(node: Node, port: int) -> tuple[list[str], dict[str, str]]:
    """One agent per node."""
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node.number - 1)]
    return [str(BIN / "torchrun"), *where, "--master-addr", "node1", "--master-port", str(port)], {}


def by_deepspeed(node: Node, port: int) -> tuple[list[str], dict[str, str]]:
    """With a host file, but without ssh: the command on each node."""
    hostfile = node.folder / "hostfile"
    hostfile.write_text("node1 slots=1\nnode2 slots=1\n")
    where = ["--no_ssh", "--node_rank", str(node.number - 1), "--master_addr", "node1", "--master_port", str(port)]
    return [str(BIN / "deepspeed"), "--hostfile", str(hostfile), *where], {"PATH": f"{BIN}:{os.environ['PATH']}"}


def by_elastic(node: Node, port: int) -> tuple[list[str], dict[str, str]]:
    """One supervisor per node, which starts the ranks; a node that is lost is known soon."""
    options = ["--elastic", "--nnodes", "1:2", "--nproc-per-node", "1", "--lease", "3", "--pause", "0"]
    return [sys.executable, "-m", "amclr_scale", "supervise", *options, "--", sys.executable], {}


LAUNCHERS: dict[str, Callable[[Node, int], tuple[list[str], dict[str, str]]]] = {
    "by hand": by_hand, "SLURM": by_slurm, "torchrun": by_torchrun, "deepspeed": by_deepspeed,
    "supervise --elastic": by_elastic,
}  # fmt: skip


@dataclass
class Started:
    """A run that is going on: one command per node."""

    commands: list[subprocess.Popen[bytes]]
    logs: list[Path]
    began: float = field(default_factory=time.monotonic)

    def rank(self, number: int) -> psutil.Process:
        """The process that trains on a node."""
        top = psutil.Process(self.commands[number].pid)
        for process in (top, *top.children(recursive=True)):
            if SCRIPT in process.cmdline()[1:3] and "python" in process.name():
                return process
        raise RuntimeError(f"no rank {number}:\n{self.said(number)}")

    def said(self, number: int) -> str:
        """What came out on a node."""
        return self.logs[number].read_text(errors="replace")

    def wait(self, numbers: Sequence[int] = (0, 1), patience: float = PATIENCE) -> list[int]:
        """Exit codes of the commands on these nodes."""
        until = time.monotonic() + patience
        return [self.commands[number].wait(max(0.1, until - time.monotonic())) for number in numbers]

    def end(self) -> None:
        """Nothing of it is left."""
        for command in self.commands:
            top = psutil.Process(command.pid) if command.poll() is None else None
            for process in (*(top.children(recursive=True) if top else ()), *([top] if top else ())):
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            command.wait()


class Runs:
    """Starts runs on the nodes of one cluster, each at a port of its own."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self._port = cluster, folder, 29500

    def start(
        self,
        launcher: str,
        words: Sequence[str],
        *,
        only: Sequence[int] = (0, 1),
        own: dict[int, list[str]] | None = None,
        environment: dict[str, str] | None = None,
    ) -> Started:
        """Start one command on each node.

        Args:
            only: numbers of ranks that are started.
            own: further words of a node.
        """
        self._port += 1
        commands, logs = [], []
        for number in only:
            node = self.cluster.nodes[number]
            command, variables = LAUNCHERS[launcher](node, self._port)
            log = self.folder / f"log{self._port}.{number}"
            line = ["env", *(f"-u{name}" for name in FOREIGN), *(f"{k}={v}" for k, v in variables.items()),
                    *(f"{k}={v}" for k, v in (environment or {}).items()), *command, SCRIPT, *words,
                    *(own or {}).get(number, [])]  # fmt: skip
            commands.append(node.start(line, log, QUIET))
            logs.append(log)
        return Started(commands, logs)


def trace(run: Path) -> dict[int, float]:
    """Loss by step."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return {}
    found = {}
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # half a line
            continue
        if "loss" in record:
            found[record["step"]] = record["loss"]
    return found


def until_step(started: Started, step: int) -> None:
    """Wait until this start of a run has come to a step, as its console says.

    Raises:
        RuntimeError: it has ended before, or does not move.
    """
    until = time.monotonic() + PATIENCE
    while max(map(int, re.findall(r"^step +(\d+)/", started.said(0), re.MULTILINE)), default=0) < step:
        if any(command.poll() is not None for command in started.commands) or time.monotonic() > until:
            raise RuntimeError(f"step {step} is not reached:\n" + "\n".join(map(started.said, range(2))))
        time.sleep(0.02)


def saved(run: Path) -> int:
    """Step of the newest whole checkpoint."""
    return max((int(path.name.removeprefix("step_")) for path in run.glob("checkpoints/step_*")), default=0)
