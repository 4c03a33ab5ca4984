"""Run a training command until it is done: after a crash, a dead rank or a preemption, start it again.

    amclr-scale supervise --restarts 10 -- deepspeed launch/train.py --config x.yaml run.name=x resume=auto

The command must say resume=auto, and run.name so that it goes on with its own run. Exit code 2 (a mistake that words
can mend) is not tried again, nor is a run that made no step in three starts one after another. A run is done when it
has left evaluation.json in its folder, because launchers do not all pass exit codes on: 0 without that file is a crash.
With it, another code (the last checkpoint could not be written) is no reason to start again, and is told. Signals sent
to this process are passed on to the command, and end the restarts: on all nodes, where each has a `supervise` of its
own, which reads of it in the run folder. Exit codes: 0 done, 2 a mistake, 75 ended by a signal, 1 given up, or done
with an error.

    amclr-scale supervise --elastic --nnodes 1:4 -- amclr-scale train --config x.yaml run.name=x resume=auto

on every node starts the ranks itself, and goes on without the nodes that are lost. SIGTERM to one of these supervisors
has its node leave the run; Ctrl-C ends all.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from types import FrameType
from typing import Any

from amclr_scale.checkpoint.marks import ASKED, RESULT, Changes
from amclr_scale.checkpoint.signals import ENDING, EXIT_RESUMABLE
from amclr_scale.commands.supervising.elastic import Elastic, Options, nodes_of, slots_of
from amclr_scale.commands.supervising.looks import FRUITLESS, begin, end_group, newest_step, run_of
from amclr_scale.commands.words import command_parser
from amclr_scale.distributed.membership import Limits
from amclr_scale.errors import UserError


def supervise(command: list[str], restarts: int, pause: float) -> int:
    """Run, look, run again. Returns the exit code."""
    run = run_of(command)
    result, asked = Changes(run / RESULT), Changes(run / ASKED)
    received: list[int] = []
    passed: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        received.append(number)
        asked.tell()
        if child is not None and child.poll() is None:
            passed.append(number)
            os.killpg(child.pid, number)

    for number in ENDING:
        signal.signal(number, pass_on)
    fruitless = 0
    for start in range(restarts + 1):
        before = newest_step(run)
        if received or asked.happened:  # while nothing ran; whatever comes now is seen after the start
            return EXIT_RESUMABLE
        child = begin(command)
        if received and not passed:  # it came before there was somebody to pass it on to
            os.killpg(child.pid, received[-1])
        code = child.wait()
        if result.happened:
            if code:
                print(
                    f"\nsupervise: {result.path} is there, but the command ended with {code}: see above",
                    file=sys.stderr,
                )
            return int(code != 0)
        if code == 2:
            return 2
        if received or asked.happened:
            end_group(child.pid, numbers=(0,))  # `deepspeed` ends at once, and its ranks when they have saved
            return EXIT_RESUMABLE
        fruitless = 0 if newest_step(run) > before else fruitless + 1
        words = f"start {start + 1} ended with {code}, newest checkpoint: step {newest_step(run)}"
        print(f"\nsupervise: {words}", file=sys.stderr)
        if fruitless == FRUITLESS:
            print(f"supervise: {FRUITLESS} starts in a row made no checkpoint; giving up", file=sys.stderr)
            return 1
        end_group(child.pid)
        until = time.monotonic() + pause
        while not (received or asked.happened) and time.monotonic() < until:
            time.sleep(0.1)
    print(f"supervise: {restarts} restarts are used up", file=sys.stderr)
    return 1


def check(args: argparse.Namespace, unused: dict[str, Any]) -> None:
    """Refuse numbers that are none, and what only --elastic reads without it.

    Args:
        unused: options of elastic runs, as they are where nobody gives them.

    Raises:
        UserError: naming the option.
    """
    for name in () if args.elastic else unused:
        if (got := getattr(args, name)) != unused[name]:
            raise UserError(f"--{name.replace('_', '-')}: expected it beside --elastic, got {got} without")
    for name in ("restarts", "pause", "lease", "gather"):
        got = getattr(args, name)
        if not (got > 0 if name == "lease" else got >= 0):
            raise UserError(f"--{name}: expected {'more than 0' if name == 'lease' else 'at least 0'}, got {got:g}")


def main(argv: list[str]) -> int:
    """Read the command line and supervise."""
    parser = command_parser("supervise", __doc__)
    parser.add_argument("--restarts", type=int, default=10)
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before a restart")
    elastic = parser.add_argument_group("elastic runs")
    elastic.add_argument("--elastic", action="store_true", help="go on without nodes that are lost, and take them back")
    elastic.add_argument("--nnodes", default="1:64", metavar="MIN:MAX", help="nodes that it may have (%(default)s)")
    elastic.add_argument("--nproc-per-node", default="gpu", metavar="N", help="ranks on this node; gpu: its GPUs, or 1")
    elastic.add_argument("--address", metavar="HOST", help="at which other nodes reach this one; default: its name")
    elastic.add_argument("--lease", type=float, default=20.0, help="seconds of silence that a lost node is known by")
    elastic.add_argument("--gather", type=float, default=60.0, help="seconds to wait for MAX nodes at the start")
    parser.add_argument("command", nargs="+", help="after --")
    args = parser.parse_args(argv)
    names = ("nnodes", "nproc_per_node", "address", "lease", "gather")
    try:
        check(args, {name: parser.get_default(name) for name in names})
        if not args.elastic:
            return supervise(args.command, args.restarts, args.pause)
        limits = Limits(*nodes_of(args.nnodes), args.restarts, FRUITLESS)
        options = Options(limits, slots_of(args.nproc_per_node), args.address, args.lease, args.gather, args.pause)
        return Elastic(args.command, options).supervise()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
