"""An elastic run on the two nodes: one is switched off, the run goes on, the node comes back and is taken in again.

Every part of its trace, from one start to the next, must be bit for bit that of a run which nobody disturbs, on as many
ranks, from the same checkpoint; and its beginning that of two ranks up to rounding.
"""

import json
import math
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.cluster.nodes import CARD, ROOT
from tools.cluster.runs import BIN, FOREIGN, PATIENCE, QUIET, SCRIPT, Runs, Started, saved, trace, words_of

LEASE = 3.0  # seconds
ROUNDING, EARLY = 1e-5, 10  # of a loss, between numbers of ranks, in the first steps: later on it grows
ELASTIC = "supervise --elastic"


@dataclass
class Change:
    """What happened to a node, and what the run did."""

    what: str
    seconds: float  # from it to the next step
    ranks: int  # then
    lost: int  # steps


def wait_for(what: str, true: Callable[[], bool], started: Sequence[Started]) -> None:
    """Wait until something is so.

    Raises:
        RuntimeError: it is not in time.
    """
    until = time.monotonic() + PATIENCE
    while not true():
        if time.monotonic() > until:
            said = [one.said(number) for one in started for number in range(len(one.logs))]
            raise RuntimeError(f"elastic: {what} does not come:\n" + "\n".join(said))
        time.sleep(0.05)


def starts_of(run: Path) -> list[tuple[int, int]]:
    """The step that each start of a run began at, and its number of ranks."""
    try:
        first = json.loads((run / "environment.json").read_text())
    except (OSError, ValueError):
        return []
    return [(0, first["ranks"]), *((one["step"], one["ranks"]) for one in first.get("resumed", []))]


def trains_again(run: Path, starts: int) -> bool:
    """Whether a start has taken a step."""
    begun = starts_of(run)
    return len(begun) > starts and max(trace(run), default=0) > begun[starts][0]


def lose_and_take_back(runs: Runs, folder: Path, watch: float, both: bool) -> list[Change]:
    """Start a run on both nodes, switch node 2 off, and on again; then node 1 too, if both; and wait for its end.

    Raises:
        RuntimeError: it does not go on, does not end well, or computes something else.
    """
    run, changes = folder / "elastic", list[Change]()
    words = [*words_of(folder, run.name, watch), "checkpoint.keep=100"]
    environment = {"GLOO_SOCKET_IFNAME": CARD}
    first = runs.start(ELASTIC, words, environment=environment)
    all_started = [first]
    try:
        wait_for("step 10", lambda: max(trace(run), default=0) >= 10, all_started)
        changes.append(switch_off(runs, 1, run, all_started, starts=1))
        rank = first.rank(0)
        rank.send_signal(signal.SIGSTOP)  # or it would be done before the node is there
        runs.cluster.replace(runs.cluster.nodes[1])
        began = time.monotonic()
        second = runs.start(ELASTIC, words, environment=environment, only=(1,))
        all_started.append(second)
        wait_for("node 2", lambda: "node2 has come" in first.said(0), all_started)
        rank.send_signal(signal.SIGCONT)
        wait_for("a step of both", lambda: trains_again(run, 2), all_started)
        changes.append(Change("node 2 back", time.monotonic() - began, starts_of(run)[2][1], 0))
        if both:
            changes.append(switch_off(runs, 0, run, all_started, starts=3))
        codes = second.wait((0,)) + ([] if both else first.wait((0,)))
        if any(codes):
            raise RuntimeError(f"elastic: codes {codes}:\n{first.said(0)}\n{second.said(0)}")
    finally:
        for one in all_started:
            one.end()
        runs.cluster.repair()  # node 1 may be off
    begun = starts_of(run)
    if [ranks for _, ranks in begun] != [2, 1, 2, 1][: 3 + both]:
        raise RuntimeError(f"elastic: starts {begun}")
    compare(folder, run, begun)
    return changes


def switch_off(runs: Runs, number: int, run: Path, started: list[Started], starts: int) -> Change:
    """One node has no power any more."""
    node = runs.cluster.nodes[number]
    node.link(up=False)
    node.switch_off()
    began, done, kept = time.monotonic(), max(trace(run)), saved(run)
    wait_for(f"a step without {node.name}", lambda: trains_again(run, starts), started)
    what = f"node {number + 1} off" + (" (rank 0's)" if number == 0 else "")
    return Change(what, time.monotonic() - began, starts_of(run)[starts][1], max(0, done - kept))


def compare(folder: Path, run: Path, begun: Sequence[tuple[int, int]]) -> None:
    """Each start of a run with one from its checkpoint that nobody disturbs, and the whole with `folder/whole`.

    Raises:
        RuntimeError: a loss is another.
    """
    found, whole = trace(run), trace(folder / "whole")
    if set(found) != set(whole):
        raise RuntimeError(f"elastic: {len(found)} steps, expected {len(whole)}")
    early = [step for step in whole if step <= begun[1][0] + EARLY]
    far = [step for step in early if not math.isclose(found[step], whole[step], rel_tol=ROUNDING)]
    ends = [step for step, _ in begun[1:]] + [max(whole)]
    for number, ((begin, ranks), end) in enumerate(zip(begun, ends, strict=True)):
        if number == 0:
            alone = whole
        else:
            alone = undisturbed(folder, run / "checkpoints" / f"step_{begin:08d}", ranks, f"part{number}")
        far += [step for step in range(begin + 1, end + 1) if found[step] != alone[step]]
    if far:
        raise RuntimeError(f"elastic: other losses than those of a run that is not disturbed, at steps {far}")


def undisturbed(folder: Path, checkpoint: Path, ranks: int, name: str) -> dict[int, float]:
    """Losses of so many ranks of one node from a checkpoint to the end."""
    command = [str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", "29401", SCRIPT]
    environment = {k: v for k, v in os.environ.items() if k not in FOREIGN} | QUIET
    words = [*words_of(folder, name, 120)[:-1], f"resume={checkpoint}"]
    with (folder / f"log_{name}").open("w") as log:
        subprocess.run([*command, *words], cwd=ROOT, env=environment, check=True, stdout=log, stderr=log)
    return trace(folder / name)


def table(changes: Sequence[Change]) -> str:
    """Markdown."""
    lines = ["| what happens | it trains again after | on ranks | steps lost |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {c.what} | {c.seconds:.1f} s | {c.ranks} | {c.lost} |" for c in changes])
