"""What supervisors look at: the words of the command, files of the run folder, processes that are left."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import psutil

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.files import CHECKPOINTS
from amclr_scale.checkpoint.marks import step_elsewhere
from amclr_scale.config import schema
from amclr_scale.config.load import read_file
from amclr_scale.config.shipped import find
from amclr_scale.distributed.network import LISTENS
from amclr_scale.errors import UserError

FRUITLESS = 3  # starts without a new checkpoint after which there is no point in another


def run_of(command: Sequence[str]) -> Path:
    """The run folder that a command goes on with.

    Raises:
        UserError: it would not go on with its own.
    """
    if _word(command, "resume", "") != "auto" or not _word(command, "run.name", ""):
        raise UserError("command: expected the words resume=auto and run.name=NAME in it")
    return Path(_word(command, "run.folder", "") or _folder(command)) / _word(command, "run.name", "")


def _folder(command: Sequence[str]) -> str:
    """`run.folder` of the command's configuration file; where that cannot be read, the command says so itself."""
    given = [after for word, after in pairwise([*command, ""]) if word == "--config"]
    given += [word.partition("=")[2] for word in command if word.startswith("--config=")]
    try:
        run = read_file(find(given[-1])).get("run") if given else None
    except UserError:
        run = None
    found = run.get("folder") if isinstance(run, dict) else None
    return found if isinstance(found, str) else schema.Run().folder


def _word(command: Sequence[str], key: str, otherwise: str) -> str:
    """The value of a key=value word of the command; the last one counts."""
    return next((w.partition("=")[2] for w in reversed(command) if w.startswith(f"{key}=")), otherwise)


def begin(command: Sequence[str], environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Start a command as the leader of a process group of its own, with the port that is held for it.

    Raises:
        UserError: there is no such program.
    """
    kept = [int(environment[LISTENS])] if environment and LISTENS in environment else []
    try:
        return subprocess.Popen(command, start_new_session=True, env=environment, pass_fds=kept)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise UserError(f"command: expected a program to start, got {command[0]} ({error.strerror})") from error


def newest_step(run: Path) -> int:
    """The step of the newest checkpoint, here or on the node that keeps them."""
    return max([*files.steps(run / CHECKPOINTS), step_elsewhere(run)[1]])


def _lives(group: int) -> bool:
    """Whether a process group has a process that runs: one that has ended may wait for ever to be asked how."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_group(group: int, patience: float = 60.0, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """End what a dead launcher left behind, so that no two copies write one run folder.

    Args:
        group: of processes.
        patience: seconds to wait after each signal.
        numbers: of the signals; 0: only wait.
    """
    for number in numbers:
        until = time.monotonic() + patience
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        while time.monotonic() < until:
            if not _lives(group):
                return
            time.sleep(0.2)
