"""Break a run on two nodes in every way that is known, resume it each time, and compare it with the run on one node.

    python -m tools.cluster_test                                     (Linux, root; takes minutes)

The nodes are namespaces of this machine (tools/cluster/nodes.py). The run is the quickstart on two ranks, one per node,
started by one launcher after the other, with a checkpoint every few steps. Each fault is put in while it trains, and
the seconds are counted until the last process of it that still can has ended. In the end losses and weights must equal
those of two ranks on one node bit for bit. Then come mistakes, which must end all ranks in words before they train,
an elastic run (tools/cluster/elastic.py) that loses each node once, and one whose nodes share no folder
(tools/cluster/unshared.py).
Prints a table in Markdown; exit code 1 where anything is not as it should be.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from safetensors.numpy import load_file

from tools.cluster import elastic, unshared
from tools.cluster.nodes import CARD, ROOT, Cluster, why_not
from tools.cluster.runs import BIN, EVERY, FOREIGN, QUIET, SCRIPT, Runs, Started, saved, trace, until_step, words_of

PAGE, MARKS = ROOT / "docs" / "clusters.md", ("<!-- faults -->", "<!-- faults end -->")


@dataclass
class Row:
    """What one fault did."""

    fault: str
    launcher: str
    seconds: float
    codes: list[int]
    lost: int | None  # steps; None: before training
    said: str


def stopped(runs: Runs, started: Started) -> tuple[int, ...]:
    """Rank 0 sleeps, with everything that it holds open."""
    started.rank(0).send_signal(signal.SIGSTOP)
    return (1,)


def cut(runs: Runs, started: Started) -> tuple[int, ...]:
    """Both nodes live, and do not reach one another."""
    runs.cluster.nodes[1].link(up=False)
    return (0, 1)


def off(runs: Runs, started: Started) -> tuple[int, ...]:
    """Rank 0's node loses its power: no process says goodbye, and no packet."""
    runs.cluster.nodes[1].link(up=False)
    runs.cluster.nodes[0].switch_off()
    return (1,)


def killed(runs: Runs, started: Started) -> tuple[int, ...]:
    """Rank 1 is killed with signal 9."""
    started.rank(1).kill()
    return (0, 1)


def launcher_killed(runs: Runs, started: Started) -> tuple[int, ...]:
    """What has started rank 1 is killed with signal 9."""
    rank = started.rank(1)
    (rank.parent() or rank).kill()
    return (0, 1)


@dataclass(frozen=True)
class Fault:
    """What is done to a run, and what must be said by those that it leaves."""

    name: str
    launcher: str
    act: Callable[[Runs, Started], tuple[int, ...]]  # returns the numbers of the ranks that can still end
    words: str  # a pattern
    waits: bool  # whether run.watch_minutes has to pass


LOST = r"rank 0 \(node1\) at node1 has not answered for|rank [01] \(node[12]\) has given no sign of life for"
FAULTS = [
    Fault("rank 0 stopped (SIGSTOP)", "by hand", stopped, LOST, waits=True),
    Fault("cable between the nodes cut", "SLURM", cut, LOST, waits=True),
    Fault("rank 0's node off", "torchrun", off, LOST, waits=True),
    Fault("rank 1 killed (SIGKILL)", "by hand", killed, r"rank \d|Connection closed|reset by peer", waits=False),
    Fault("rank 1's launcher killed (SIGKILL)", "torchrun", launcher_killed, "came; saved after step", waits=False),
]


def last_words(text: str, pattern: str) -> str:
    """The first line that has the pattern."""
    return next((line.strip() for line in text.splitlines() if re.search(pattern, line)), "")


def put_in(runs: Runs, fault: Fault, run: Path, watch: float, further: Sequence[str]) -> Row:
    """Start the run or go on with it, break it after two more checkpoints, and wait until all have ended.

    Raises:
        RuntimeError: it ended as if nothing were wrong, too late, or without a word.
    """
    words = [*words_of(run.parent, run.name, watch), *further]
    started = runs.start(fault.launcher, words, environment={"GLOO_SOCKET_IFNAME": CARD})
    try:
        until_step(started, saved(run) + EVERY + 2)
        began = time.monotonic()
        left = fault.act(runs, started)
        codes = started.wait(left, watch + 60)
        seconds = time.monotonic() - began
        said = "\n".join(started.said(number) for number in left)
    finally:
        started.end()
        runs.cluster.repair()
    found = last_words(said, fault.words)
    bound = watch + max(15, 4 * watch) if fault.waits else 45
    if not found or 0 in codes or seconds > bound:
        raise RuntimeError(f"{fault.name}: codes {codes} after {seconds:.1f} s (bound {bound:.0f}), said:\n{said}")
    return Row(fault.name, fault.launcher, seconds, codes, max(trace(run)) - saved(run), found)


def one_node(folder: Path) -> None:
    """The run that nobody breaks, by two ranks of one node."""
    command = [str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", "29400", SCRIPT]
    environment = {k: v for k, v in os.environ.items() if k not in FOREIGN} | QUIET
    with (folder / "log_whole").open("w") as log:
        subprocess.run([*command, *words_of(folder, "whole", 120)], cwd=ROOT, env=environment, check=True,
                       stdout=log, stderr=log)  # fmt: skip


def differences(one: Path, other: Path) -> list[str]:
    """Steps and weights in which two runs differ."""
    first, second = trace(one), trace(other)
    found = [f"step {step}" for step in {**first, **second} if first.get(step) != second.get(step)]
    weights = [load_file(run / "weights.safetensors") for run in (one, other)]
    return found + [name for name in weights[0] if (weights[0][name] != weights[1][name]).any()]


def through_faults(runs: Runs, folder: Path, faults: Sequence[Fault], watch: float, apart: bool = False) -> list[Row]:
    """One run, broken by one fault after the other and resumed by another launcher each time, to its end.

    Args:
        apart: the nodes share no run folder.

    Raises:
        RuntimeError: it does not equal the run on one node, or a fault was not ended as it should be.
    """
    if not (folder / "whole").exists():
        one_node(folder)
    home, further = (folder / "apart", unshared.WORDS) if apart else (folder, ())
    run, rows = home / "broken", list[Row]()
    for fault in faults:
        if apart:
            unshared.separate(runs, home)
        rows.append(put_in(runs, fault, run, watch, further))
    if apart:
        unshared.separate(runs, home)
    words = [*words_of(home, run.name, watch), *further]
    last = runs.start("deepspeed", words, environment={"GLOO_SOCKET_IFNAME": CARD})
    try:
        codes = last.wait()
        if codes != [0, 0] or "note: resumed from" not in last.said(0):
            raise RuntimeError(f"deepspeed: codes {codes}:\n{last.said(0)}\n{last.said(1)}")
    finally:
        last.end()
    if wrong := differences(folder / "whole", run):
        raise RuntimeError(f"other than on one node: {', '.join(wrong)}")
    return rows


@dataclass(frozen=True)
class Mistake:
    """Something that is not the same on both nodes."""

    name: str
    words: str  # a pattern that both nodes' output must have
    own: dict[int, list[str]] = field(default_factory=dict)  # of one rank
    hidden: str = ""  # a folder in which node 2 sees nothing
    environment: dict[str, str] = field(default_factory=lambda: {"GLOO_SOCKET_IFNAME": CARD})
    only: tuple[int, ...] = (0, 1)
    code: int = 2


def mistakes(folder: Path) -> list[Mistake]:
    """All of them."""
    return [
        Mistake("another learning rate on node 2", r"optimizer\.lr: expected the same on all ranks, got 0\.002 on rank "
                r"0 \(node1\), 0\.5 on rank 1 \(node2\)", own={1: ["optimizer.lr=0.5"]}),
        Mistake("no data on node 2", r"data\.train: .*", own={1: [f"data.train={folder}/nowhere/00000.tar"]}),
        Mistake("the run folder is not shared", r"run\.folder: expected a folder that all ranks see and can write, "
                r"got: .*rank 1 \(node2\)", hidden=str(folder / "unshared")),
        Mistake("node 1 calls itself 127.0.1.1", r"GLOO_SOCKET_IFNAME: node1 is called 127\.0\.1\.1 on itself "
                rf"\(rank 0\).*set GLOO_SOCKET_IFNAME={CARD} there", environment={}),
        Mistake("node 2 is not started", r"not all ranks have met within 0\.1 minutes .*rank 1 of 2 did not come",
                only=(0,), code=1),
    ]  # fmt: skip


def make(runs: Runs, mistake: Mistake, folder: Path) -> Row:
    """Start two ranks with the mistake, and wait until both have ended.

    Raises:
        RuntimeError: one of them trained, ended otherwise, or did not say what was wrong.
    """
    home = folder / "unshared"
    home.mkdir(exist_ok=True)
    if mistake.hidden:
        runs.cluster.nodes[1].run("mount", "-t", "tmpfs", "none", mistake.hidden)
    words = [*words_of(home, "mistaken", 120), "run.rendezvous_minutes=0.1" if len(mistake.only) == 1 else "seed=0"]
    began = time.monotonic()
    started = runs.start("by hand", words, own=mistake.own, only=mistake.only, environment=mistake.environment)
    try:
        codes = started.wait(range(len(mistake.only)))
    finally:
        started.end()
        if mistake.hidden:
            runs.cluster.nodes[1].run("umount", mistake.hidden)
    said = [started.said(number) for number in range(len(mistake.only))]
    found = [last_words(one, mistake.words) for one in said]
    if set(codes) != {mistake.code} or not all(found) or "Traceback" in "".join(said) or trace(home / "mistaken"):
        raise RuntimeError(f"{mistake.name}: codes {codes}, said:\n" + "\n".join(said))
    return Row(mistake.name, "by hand", time.monotonic() - began, codes, None, found[0])


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| fault | started by | all have ended after | exit codes | steps lost |", "|---|---|---|---|---|"]
    for row in rows:
        lost = "before training" if row.lost is None else row.lost
        codes = ", ".join(map(str, row.codes))
        lines.append(f"| {row.fault} | {row.launcher} | {row.seconds:.1f} s | {codes} | {lost} |")
    return "\n".join(lines)


def main() -> int:
    """All faults and mistakes, told as a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch", type=float, default=6.0, help="run.watch_minutes of the runs, in seconds")
    parser.add_argument("--folder", type=Path, help="for runs and logs; default: one that is removed")
    parser.add_argument("--write", action="store_true", help="also put the table into docs/clusters.md")
    args = parser.parse_args()
    if words := why_not():
        print(words, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        with Cluster(folder, debian=True) as cluster:
            runs = Runs(cluster, folder)
            try:
                rows = through_faults(runs, folder, FAULTS, args.watch)
                rows += [make(runs, mistake, folder) for mistake in mistakes(folder)]
                changes = elastic.lose_and_take_back(runs, folder, args.watch, both=True)
                apart = through_faults(runs, folder, FAULTS[-2:-1], args.watch, apart=True)
                rows += [replace(row, fault=f"{row.fault}, nodes share no folder") for row in apart]
                saving = unshared.saving_of(runs, folder / "apart" / "broken")
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
    tables = f"{table(rows)}\n\nAn elastic run, whose nodes are known to be lost after 3 s:\n\n{elastic.table(changes)}"
    tables += f"\n\n{saving.words()}"
    print(tables)
    if args.write:
        before, _, rest = PAGE.read_text().partition(MARKS[0])
        _, _, after = rest.partition(MARKS[1])
        PAGE.write_text(f"{before}{MARKS[0]}\n\n{tables}\n\n{MARKS[1]}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
