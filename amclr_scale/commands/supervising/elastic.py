"""`supervise --elastic`: a run that goes on without the nodes that are lost, and takes them back.

One supervisor per node starts the node's ranks itself. They find one another in the run folder (distributed.membership)
and follow one plan. A node is lost: what is left of the run is ended at once, and starts from the newest checkpoint on
the nodes that are there. A node comes: the run is asked to save and ends, and starts again with it. What is computed
does not depend on the number of ranks, beyond rounding.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import FrameType

from amclr_scale.checkpoint.marks import ASKED, RESULT, Changes
from amclr_scale.checkpoint.signals import ENDING, EXIT_RESUMABLE
from amclr_scale.commands.supervising.looks import begin, end_group, newest_step, run_of
from amclr_scale.config.load import load
from amclr_scale.distributed.launcher import environments
from amclr_scale.distributed.membership import (
    Board,
    Limits,
    Member,
    Node,
    Plan,
    after_the_end,
    leader,
    newest,
    share_out,
)
from amclr_scale.distributed.network import HeldPort
from amclr_scale.errors import UserError

GRACE = 10.0  # seconds that ranks get to end by themselves when others have ended badly
LOST = 2.0  # the same, when a node is lost
SAVING = 600.0  # seconds that they get to save
SAID = 30.0  # seconds between two lines about who is waited for
LOCKED = 120.0  # seconds after which a file server frees what a lost node has locked
LAUNCHERS = {"deepspeed", "torchrun", "torch.distributed.run", "accelerate", "srun", "mpirun", "mpiexec"}


@dataclass(frozen=True)
class Options:
    """How a supervisor is started."""

    limits: Limits
    slots: int
    address: str | None
    lease: float
    gather: float
    pause: float


def slots_of(text: str) -> int:
    """A number of ranks per node: as given, or the GPUs here (1 without any).

    Raises:
        UserError: it is none.
    """
    if text == "gpu":
        words = "import torch; print(torch.cuda.device_count())"
        return max(1, int(subprocess.run([sys.executable, "-c", words], capture_output=True, check=True).stdout))
    if not text.isdecimal() or not int(text):
        raise UserError(f"--nproc-per-node: expected a number of ranks, or gpu, got {text}")
    return int(text)


def nodes_of(text: str) -> tuple[int, int]:
    """`1:4`: the fewest and the most nodes.

    Raises:
        UserError: it is no such pair.
    """
    least, _, most = text.partition(":")
    if not (least.isdecimal() and (most or least).isdecimal() and 0 < int(least) <= int(most or least)):
        raise UserError(f"--nnodes: expected MIN:MAX, such as 1:4, got {text}")
    return int(least), int(most or least)


def fitting(command: Sequence[str]) -> Callable[[int], bool]:
    """Whether the recipe of a command can be cut into a number of ranks.

    Raises:
        UserError: it cannot be read, whatever the number.
    """
    from amclr_scale.commands.train import arguments

    starts = [at for at, word in enumerate(command) if word == "train" or word.endswith("train.py")]
    if not starts or LAUNCHERS & {Path(word).name for word in command[: starts[0]]}:
        raise UserError(
            f"command: expected the command of one rank, such as amclr-scale train ..., got {' '.join(command)}; with "
            "--elastic, supervise starts the ranks itself"
        )
    options = arguments(list(command[starts[0] + 1 :]))
    if not load(options.config, options.words).run.shared:
        raise UserError(
            "run.shared: expected true with --elastic, got false: any node may be lost, so none can keep the run for "
            "all; put run.folder on a file system that all nodes mount"
        )

    @cache
    def fits(ranks: int) -> bool:
        try:
            load(options.config, options.words, ranks)
        except UserError:
            return False
        return True

    return fits


class Ranks:
    """The ranks of this node under one plan."""

    def __init__(self, command: Sequence[str], plan: Plan, node: str, locked: bool, port: HeldPort | None):
        mine, first = plan.of(node), plan.members[0].host
        assert mine
        kept = {"AMCLR_SCALE_LOCK_SECONDS": str(LOCKED)} if locked else {}
        self._children = [
            begin(command, said | kept | (port.variables_for(said) if port else {}))
            for said in environments(first, plan.port, plan.ranks, plan.first_rank(node), mine.ranks)
        ]
        self._until, self._asked = float("inf"), False

    def code(self) -> int | None:
        """With which they have ended together: 2, or else the first that is not 0 or 75; None: some run."""
        codes = [child.poll() for child in self._children]
        if any(code not in (None, 0, EXIT_RESUMABLE) for code in codes):
            self.within(GRACE)
        if None in codes:
            if time.monotonic() > self._until:
                self.kill()
            return None
        known = [code for code in codes if code is not None]
        return min(known, key=lambda code: (code != 2, code in (0, EXIT_RESUMABLE), code == 0))

    def ask(self, number: int, *, again: bool = False) -> None:
        """Have them save and end; those that have been asked end at once if they are asked again."""
        if self._asked and not again:
            return
        self._asked = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)
        self.within(SAVING)

    def within(self, seconds: float) -> None:
        """End those that are still there after this time."""
        self._until = min(self._until, time.monotonic() + seconds)

    def kill(self) -> None:
        """End them now, with their data workers."""
        for child in self._children:
            if child.poll() is None:
                child.kill()
        for child in self._children:
            end_group(child.pid, numbers=(signal.SIGKILL,))


def say(words: str) -> None:
    """To whoever reads the node's output."""
    print(f"supervise: {words}", file=sys.stderr, flush=True)


class Elastic:
    """The supervisor of one node."""

    def __init__(self, command: Sequence[str], options: Options):
        self.command, self.options = command, options
        self.run = run_of(command)
        self.fits = fitting(command)
        self.board = Board(self.run, Node.here(options.slots, options.address), options.lease)
        self.result, self.asked = Changes(self.run / RESULT), Changes(self.run / ASKED)
        self.ranks: Ranks | None = None
        self.port: HeldPort | None = None  # of the plan that this node has proposed, till its rank 0 has it
        self.received: list[int] = []
        self.passed = 0  # of them
        self.ended_at: float | None = None  # when this node, as the leader, first saw that all had ended
        self.said_at = time.monotonic() - SAID + 2 * options.lease
        self.since = time.monotonic()  # of the present plan
        self.lost = set[str]()  # members of it

    @property
    def name(self) -> str:
        """This node's."""
        return self.board.mine.name

    @property
    def plan(self) -> Plan:
        """That this node follows."""
        return self.board.mine.plan

    def receive(self, number: int, _: FrameType | None) -> None:
        """A signal has come."""
        self.received.append(number)

    def supervise(self) -> int:
        """Until the run is done, or this node leaves it. Returns the exit code."""
        for number in ENDING:
            signal.signal(number, self.receive)
        try:
            while True:
                living = self.board.look()
                self.heed_signals()
                self.watch(living)
                if (code := self.conclusion()) is not None:
                    return code
                self.follow(living)
                self.lead(living)
                time.sleep(self.board.beat / 2)
        finally:
            if self.ranks:
                self.ranks.kill()
            if self.plan.over is None:
                self.board.leave()

    def heed_signals(self) -> None:
        """SIGTERM: this node leaves. Ctrl-C: all end."""
        new = self.received[self.passed :]
        self.passed += len(new)
        if signal.SIGINT in new:
            self.asked.tell()
        ends = self.asked.happened
        if (new or ends) and not self.board.mine.leaves:
            self.board.say(replace(self.board.mine, leaves=True))
            if self.ranks:  # which may save already, for the next plan
                self.ranks.ask(new[0] if new else signal.SIGTERM)
            new = new[1:]
        for number in new:
            if self.ranks:
                self.ranks.ask(number, again=True)

    def watch(self, living: dict[str, Node]) -> None:
        """How this node's ranks fare, and whether they wait for others that will not answer."""
        if self.ranks is None:
            return
        for member in self.plan.members:
            other = living.get(member.node)
            if other is None:
                if member.node not in self.lost and not self.result.happened:
                    say(f"{member.host} has left, or is lost: no sign of life for {self.options.lease:g} s")
                self.lost.add(member.node)
                self.ranks.within(GRACE if self.result.happened else LOST)
            elif other.plan.number == self.plan.number and other.code not in (None, 0, EXIT_RESUMABLE):
                self.ranks.within(GRACE)
        code = self.ranks.code()
        if code is not None:
            self.ranks.kill()  # what is left of them
            self.ranks = None
            self.board.say(replace(self.board.mine, code=code))

    def conclusion(self) -> int | None:
        """The exit code, once there is one."""
        if self.ranks:
            return None
        mine = self.board.mine
        if self.result.happened:
            if mine.code:
                say(f"{self.result.path} is there, but a rank of this node ended with {mine.code}: see above")
            return int(bool(mine.code))
        if mine.leaves:
            return EXIT_RESUMABLE
        return 2 if self.name in self.plan.refused else self.plan.over

    def follow(self, living: dict[str, Node]) -> None:
        """Take up a newer plan of whoever has one."""
        plan = newest(living.values())
        if plan == self.plan or self.board.mine.leaves:
            return
        if self.ranks:
            self.ranks.ask(signal.SIGTERM)
            return  # they save first; the next look comes here again
        self.board.say(replace(self.board.mine, plan=plan, code=None))
        self.ended_at, self.since = None, time.monotonic()
        self.lost.clear()
        if plan.over is None and plan.of(self.name):
            held = self.port if self.port and self.port.number == plan.port and plan.by == self.name else None
            self.ranks = Ranks(self.command, plan, self.name, plan.number > 1, held)
        self.let_go()

    def let_go(self) -> None:
        """Of the port: a process has it, or none will."""
        if self.port:
            self.port.close()
        self.port = None

    def lead(self, living: dict[str, Node]) -> None:
        """Make the next plan, if it is this node's turn and there is need of one."""
        plan, options = self.plan, self.options
        if leader(living, plan) != self.name or newest(living.values()) != plan:
            return
        nodes = self.candidates(living)
        if not plan.number:
            enough = len(nodes) >= options.limits.most
            if time.monotonic() - self.since > max(options.lease, 0.0 if enough else options.gather):
                self.propose(plan, nodes)
            return
        here = [living[member.node] for member in plan.members if member.node in living]
        if any(node.plan.number < plan.number or node.code is None for node in here):
            if time.monotonic() - self.since > options.lease:
                members = share_out(nodes, options.limits.most, self.fits)
                if sum(member.ranks for member in members) > plan.ranks:
                    say(f"{', '.join(sorted({m.host for m in members} - {m.host for m in plan.members}))} has come")
                    self.propose(replace(plan, known=tuple(member.node for member in plan.members)), nodes)
            return
        self.ended_at = self.ended_at or time.monotonic()
        hurried = len(here) < len(plan.members) or any(node.leaves or node.code == 2 for node in here)
        if hurried or time.monotonic() - self.ended_at > options.pause:
            self.propose(after_the_end(plan, living, newest_step(self.run), options.limits), nodes)

    def candidates(self, living: dict[str, Node]) -> list[Node]:
        """Nodes that can train: this one, those that do, the others."""
        names = [self.name, *(member.node for member in self.plan.members), *sorted(living)]
        nodes = [living[name] for name in dict.fromkeys(names) if name in living]
        return [node for node in nodes if not node.leaves and node.name not in self.plan.refused]

    def propose(self, before: Plan, nodes: list[Node]) -> None:
        """Have all follow the next plan, or wait for more nodes."""
        limits = self.options.limits
        nodes = [node for node in nodes if node.name not in before.refused]
        members = share_out(nodes, limits.most, self.fits) if len(nodes) >= limits.least else ()
        if before.over is None and not members:
            if time.monotonic() - self.said_at > SAID:
                self.said_at = time.monotonic()
                few = len(nodes) < limits.least
                ranks = sum(node.slots for node in nodes[: limits.most])
                why = f"{limits.least} nodes" if few else f"more: the recipe cannot be cut into {ranks} ranks or fewer"
                say(f"{', '.join(node.host for node in nodes)} here; waiting for {why}")
            return
        step, number = newest_step(self.run), before.number + 1
        self.let_go()
        self.port = HeldPort()  # rank 0 will be on this node
        plan = replace(before, number=number, by=self.name, members=members, port=self.port.number, step=step)
        if self.plan.number and not self.ranks:
            say(f"start {self.plan.number} has ended with {self.board.mine.code}, newest checkpoint: step {step}")
        if plan.over is None:
            say(f"start {number} on {words_of(members)}, from step {step}")
        elif plan.over == 1:
            say(f"giving up after {plan.starts} failures, {plan.fruitless} of them in a row without a new checkpoint")
        self.board.say(replace(self.board.mine, next=plan))


def words_of(members: Sequence[Member]) -> str:
    """How many ranks are where."""
    total = sum(member.ranks for member in members)
    return f"{total} rank{'s' * (total > 1)} ({', '.join(f'{member.host}: {member.ranks}' for member in members)})"
