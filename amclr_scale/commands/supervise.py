"""Run a training command until it is done: after a crash, a dead rank or a preemption, start it again.

    amclr-scale supervise --restarts 10 -- deepspeed launch/train.py --config x.yaml run.name=x resume=auto

The command must say resume=auto, and run.name so that it goes on with its own run. Exit code 2 (a mistake that words
can mend) is not tried again, nor is a run that made no step in three starts one after another. A run is done when it
has left evaluation.json in its folder, because launchers do not all pass exit codes on: 0 without that file is a crash.
With it, another code (the last checkpoint could not be written) is no reason to start again, and is told. Signals sent
to this process are passed on to the command, and end the restarts: on all nodes, where each has a `supervise` of its
own, which reads of it in the run folder. Exit codes: 0 done, 2 a mistake, 75 ended by a signal, 1 given up, or done
with an error.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from amclr_scale.checkpoint import files
from amclr_scale.checkpoint.files import CHECKPOINTS
from amclr_scale.checkpoint.signals import ENDING, EXIT_RESUMABLE
from amclr_scale.commands.words import command_parser

ASKED = "asked_to_end"  # in the run folder: when a supervisor was sent a signal last
FRUITLESS = 3  # starts without a new checkpoint after which there is no point in another


def word(command: list[str], key: str, otherwise: str) -> str:
    """The value of a key=value word of the command; the last one counts."""
    return next((w.partition("=")[2] for w in reversed(command) if w.startswith(f"{key}=")), otherwise)


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    return max(files.steps(run / CHECKPOINTS), default=0)


def supervise(command: list[str], restarts: int, pause: float) -> int:
    """Run, look, run again. Returns the exit code."""
    if word(command, "resume", "") != "auto" or not word(command, "run.name", ""):
        print("command: expected the words resume=auto and run.name=NAME in it", file=sys.stderr)
        return 2
    run = Path(word(command, "run.folder", "runs")) / word(command, "run.name", "")
    result, asked = run / "evaluation.json", run / ASKED
    received: list[int] = []
    passed: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        with contextlib.suppress(OSError):  # there is no run yet
            asked.touch()
        if child is not None and child.poll() is None:
            passed.append(number)
            os.killpg(child.pid, number)

    for number in ENDING:
        signal.signal(number, pass_on)
    fruitless, began = 0, time.time()
    for start in range(restarts + 1):
        before, since, began = newest(run), began, time.time()
        if received or changed_since(asked, since):  # while nothing ran; whatever comes now is seen after the start
            return EXIT_RESUMABLE
        child = subprocess.Popen(command, start_new_session=True)
        if received and not passed:  # it came before there was somebody to pass it on to
            os.killpg(child.pid, received[-1])
        code = child.wait()
        if changed_since(result, began):
            if code:
                print(f"\nsupervise: {result} is there, but the command ended with {code}: see above", file=sys.stderr)
            return int(code != 0)
        if code == 2:
            return 2
        if received or changed_since(asked, began):
            end_group(child.pid, numbers=(0,))  # `deepspeed` ends at once, and its ranks when they have saved
            return EXIT_RESUMABLE
        fruitless = 0 if newest(run) > before else fruitless + 1
        print(
            f"\nsupervise: start {start + 1} ended with {code}, newest checkpoint: step {newest(run)}", file=sys.stderr
        )
        if fruitless == FRUITLESS:
            print(f"supervise: {FRUITLESS} starts in a row made no checkpoint; giving up", file=sys.stderr)
            return 1
        end_group(child.pid)
        until = time.monotonic() + pause
        while not (received or changed_since(asked, began)) and time.monotonic() < until:
            time.sleep(0.1)
    print(f"supervise: {restarts} restarts are used up", file=sys.stderr)
    return 1


def changed_since(path: Path, moment: float) -> bool:
    """Whether a file is there and was written after a moment of `time.time()`."""
    try:
        return path.stat().st_mtime >= moment
    except OSError:
        return False


def lives(group: int) -> bool:
    """Whether a process group has a process that runs: one that has ended may wait for ever to be asked how."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def end_group(group: int, patience: float = 60.0, numbers: Sequence[int] = (signal.SIGTERM, signal.SIGKILL)) -> None:
    """End what a dead launcher left behind, so that no two copies write one run folder.

    Args:
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
            if not lives(group):
                return
            time.sleep(0.2)


def main(argv: list[str]) -> int:
    """Read the command line and supervise."""
    parser = command_parser("supervise", __doc__)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before a restart")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args(argv)
    return supervise(args.command, args.restarts, args.pause)
