"""Run the cells of a study on this machine: each a process of its own, some at once, none lost.

A finished cell is skipped, a broken one goes on from its checkpoint, a failing one is recorded and the study goes on.
When the study ends, however it does, its cells end too: SIGTERM and Ctrl-C ask them to save first; after kill -9 the
kernel tells them (Linux). The same command then goes on where it stopped.
"""

import base64
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

from amclr_scale.checkpoint.signals import EXIT_RESUMABLE
from amclr_scale.distributed.launcher import free_port
from amclr_scale.study.planning.plan import Execution, StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.running.folder import StudyFolder
from amclr_scale.study.running.progress import Progress

MODULE = ("-m", "amclr_scale", "train")
FOLLOW = (sys.executable, "-ES", str(Path(__file__).with_name("follow.py")))
POLL = 0.5  # seconds
_TORCHRUN = re.compile(rf"exitcode\s*: {EXIT_RESUMABLE}\b")  # it ends with 1 and tells its ranks' code in words
_MESSAGE = 20  # last lines of a log that an attempt keeps
_MOST_RESUMES = 100  # of a cell that ends early by itself (train.max_hours)


@dataclass
class _Running:
    """A cell's process."""

    cell: Planned
    process: subprocess.Popen[bytes]
    log: BinaryIO
    started: float
    slot: int  # 0 .. jobs - 1


@dataclass(frozen=True)
class Outcome:
    """How a study's run ended."""

    done: int
    failed: tuple[str, ...]
    interrupted: bool

    def __add__(self, other: "Outcome") -> "Outcome":
        """That of two runs, one after the other."""
        return Outcome(self.done + other.done, self.failed + other.failed, self.interrupted or other.interrupted)

    @property
    def exit_code(self) -> int:
        """0: every cell is finished; 1: some failed; 75: asked to end, the same command goes on."""
        return EXIT_RESUMABLE if self.interrupted else 1 if self.failed else 0


def waiting(plan: StudyPlan, folder: StudyFolder, cells: Sequence[Planned]) -> list[Planned]:
    """The cells that are not finished, in the order in which they run: all arms of one seed before the next seed, so
    that a study that is stopped early still compares all arms.
    """
    seeds = [*plan.tuning_seeds, *plan.seeds]
    return [cell for cell in sorted(cells, key=lambda one: seeds.index(one.seed)) if not folder.is_finished(cell)]


Command = Callable[[StudyPlan, StudyFolder, Planned, int], list[str]]


def command(plan: StudyPlan, folder: StudyFolder, cell: Planned, slot: int = 0) -> list[str]:
    """The command line of a cell on this machine.

    Args:
        plan, folder, cell: what to run.
        slot: which of the cells that run at once it is.
    """
    return [*_launcher(_execution(plan, cell), slot), *cell_words(plan, folder, cell)]


def _execution(plan: StudyPlan, cell: Planned) -> Execution:
    return plan.execution.model_copy(update={"ranks": cell.ranks})


def devices(execution: Execution, slot: int) -> list[str]:
    """The GPUs of a cell, out of those that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = visible.split(",") if visible else [str(number) for number in range(execution.jobs * execution.ranks)]
    return every[slot * execution.ranks : (slot + 1) * execution.ranks]


def cell_words(plan: StudyPlan, folder: StudyFolder, cell: Planned) -> list[str]:
    """What `amclr-scale train` is given for a cell."""
    execution = _execution(plan, cell)
    return [
        "--config",
        str(folder.config.absolute()),
        *cell.words,
        *(f"execution.threads={threads}" for threads in [_threads(execution)] if threads),
        *execution.words,
        *execution.words_by_batch.get(cell.global_batch_size, []),
        f"run.folder={folder.runs.absolute()}",
        f"run.name={cell.name}",
        f"run.wandb_group={plan.wandb_group or plan.name}",
        "resume=auto",
    ]


def _threads(execution: Execution) -> int | None:
    if execution.threads is None and execution.jobs == 1:
        return None  # the run's own rule
    return execution.threads or max(1, len(os.sched_getaffinity(0)) // (execution.jobs * execution.ranks))


def _launcher(execution: Execution, slot: int) -> list[str]:
    """Up to the words. DeepSpeed's is the process that its `deepspeed` command starts on a node: that one hands
    signals on to its ranks, and `deepspeed` itself does not.
    """
    match execution.launcher:
        case "python":
            return [sys.executable, *MODULE]
        case "torchrun":
            ranks = f"--nproc-per-node={execution.ranks}"
            return [sys.executable, "-m", "torch.distributed.run", "--standalone", ranks, *MODULE]
        case "deepspeed":
            own = devices(execution, slot) if execution.device == "cuda" else list(range(execution.ranks))
            world = base64.urlsafe_b64encode(json.dumps({"localhost": own}).encode()).decode()
            return [
                sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={world}",
                "--master_addr=127.0.0.1", f"--master_port={free_port()}", "--module", *MODULE[1:],
            ]  # fmt: skip


class Runner:
    """Works through the cells that are not finished.

    Args:
        plan: the plan.
        folder: its folder, written.
        cells: in the order in which they are to run.
        say: takes a line for the user.
        make_command: of a cell; another one in tests.
        until: by time.monotonic(), when to end as if a signal asked to.
    """

    def __init__(
        self,
        plan: StudyPlan,
        folder: StudyFolder,
        cells: Sequence[Planned],
        say: Callable[[str], None],
        make_command: Command = command,
        until: float = math.inf,
    ):
        self.plan, self.folder, self.cells = plan, folder, list(cells)
        self._say, self._command, self._until = say, make_command, until
        self._waiting = deque(waiting(plan, folder, cells))
        self._running: list[_Running] = []
        self._failures: dict[str, int] = {}
        self._resumes: dict[str, int] = {}
        self._failed: list[str] = []
        self._signal = ""
        self._progress = Progress(folder, cells, plan.execution.jobs)

    def run(self) -> Outcome:
        """Run until every cell is finished or has failed for good, or a signal asks to end.

        The folder is locked by whoever calls it.
        """
        before = {number: signal.signal(number, self._asked) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            with self._progress:
                self.folder.record_killed()
                while (self._waiting or self._running) and not self._over():
                    while self._waiting and len(self._running) < self.plan.execution.jobs:
                        self._start(self._waiting.popleft())
                    time.sleep(POLL)
                    self._collect()
                    self._progress.show(self._now())
                if self._running:
                    self._end()
        finally:
            for one in self._running:  # an error of ours: nobody else would end them
                _signal_group(one.process, signal.SIGKILL)
            for number, handler in before.items():
                signal.signal(number, handler)
        done = sum(self.folder.is_finished(cell) for cell in self.cells)
        return Outcome(done, tuple(self._failed), bool(self._signal))

    def _over(self) -> bool:
        """Whether somebody has asked to end, or the piece of the study that was asked for is over."""
        if not self._signal and time.monotonic() >= self._until:
            self._signal = "--minutes"
        return bool(self._signal)

    def _now(self) -> list[tuple[Planned, float]]:
        return [(one.cell, one.started) for one in self._running]

    def _asked(self, number: int, _: FrameType | None) -> None:
        if self._signal:  # the second time: at once
            for one in self._running:
                _signal_group(one.process, signal.SIGKILL)
        self._signal = signal.Signals(number).name

    def _start(self, cell: Planned) -> None:
        log = (self.folder.logs / f"{cell.name}.log").open("ab")
        slot = min(set(range(self.plan.execution.jobs)) - {one.slot for one in self._running})
        words = self._command(self.plan, self.folder, cell, slot)
        log.write(f"$ {' '.join(words)}\n".encode())
        log.flush()
        environment = dict(os.environ)
        if self.plan.execution.device == "cuda" and self.plan.execution.jobs > 1:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(devices(self.plan.execution, slot))
        process = subprocess.Popen(
            [*FOLLOW, *words], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            env=environment,
        )  # fmt: skip
        self._running.append(_Running(cell, process, log, time.time(), slot))
        self._announce()

    def _announce(self) -> None:
        self.folder.running({one.cell.name: round(one.started, 3) for one in self._running})

    def _collect(self) -> None:
        """Record cells that ended, and decide what becomes of them."""
        for one in list(self._running):
            code = one.process.poll()
            if code is None:
                continue
            _signal_group(one.process, signal.SIGKILL)  # what a launcher may have left behind
            self._running.remove(one)
            name, retries = one.cell.name, self.plan.execution.retries
            status = self._record(one, code)
            if status == "done":
                self._progress.finished(one.cell)
            elif self._signal:
                pass
            elif status == "interrupted" and self._resumes.get(name, 0) < _MOST_RESUMES:
                self._resumes[name] = self._resumes.get(name, 0) + 1
                self._waiting.append(one.cell)
            elif code != 2 and self._failures.get(name, 0) < retries:
                self._failures[name] = self._failures.get(name, 0) + 1
                self._say(f"{name}: failed with exit code {code}, is tried again; {self.folder.logs / name}.log")
                self._waiting.append(one.cell)
            else:
                self._failed.append(name)
                self._say(f"{name}: failed with exit code {code}; {self.folder.logs / name}.log")

    def _record(self, one: _Running, code: int) -> str:
        one.log.close()
        message = self._last_lines(one.cell)
        if code == 0 and self.folder.is_finished(one.cell):
            status = "done"
        else:
            early = code == EXIT_RESUMABLE or _TORCHRUN.search(message)
            status = "interrupted" if early or self._signal else "failed"
        attempt: dict[str, Any] = {
            "cell": one.cell.name,
            "started": round(one.started, 3),
            "seconds": round(time.time() - one.started, 3),
            "exit_code": code,
            "status": status,
            "message": "" if status == "done" else message,
        }
        self.folder.record(attempt)
        self._announce()
        if status == "done":
            self._say(self._progress.line(one.cell, attempt["seconds"], self._now()))
        return status

    def _last_lines(self, cell: Planned) -> str:
        text = (self.folder.logs / f"{cell.name}.log").read_text("utf-8", errors="replace")
        return "\n".join(text.splitlines()[-_MESSAGE:])

    def _end(self) -> None:
        """Ask the cells to save and end; those that do not are killed."""
        self._say(f"{self._signal}: {len(self._running)} cells save their state; the same command goes on")
        for one in self._running:
            one.process.terminate()  # not the group: launchers hand it on, and a second one ends a run at once
        until = time.monotonic() + self.plan.execution.grace_seconds
        while self._running and time.monotonic() < until:
            self._collect()
            time.sleep(POLL / 5)
        for one in self._running:
            _signal_group(one.process, signal.SIGKILL)
            one.process.wait()
        self._collect()


def _signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    """To the process and everything it started."""
    try:
        os.killpg(process.pid, number)
    except (ProcessLookupError, PermissionError):
        return
