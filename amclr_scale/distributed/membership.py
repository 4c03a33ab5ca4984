"""Which nodes are there, and which of them train: what the supervisors of an elastic run tell one another by files.

    RUN/.nodes/NODE.json    one per supervisor, touched every second: who it is, how its ranks fare, which plan it knows

A node lives while others see its file change; each judges that by a clock of its own, so clocks of different nodes are
never compared. A *plan* says which nodes train, with how many ranks. One node makes it, all that read it follow it and
hand it on in their own files; of two plans the one with the higher number counts. Imports no torch.
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

NODES = ".nodes"  # in the run folder
FORGOTTEN = 20  # leases after which the file of a lost node is removed


@dataclass(frozen=True)
class Member:
    """A node that trains, and its number of ranks."""

    node: str
    host: str
    ranks: int


@dataclass(frozen=True)
class Plan:
    """Who trains. Ranks are counted through the members in their order; the first one's address is where they meet."""

    number: int = 0
    by: str = ""  # the node that has made it
    members: tuple[Member, ...] = ()
    port: int = 0
    step: int = 0  # of the newest checkpoint when it was made
    starts: int = 0  # again, after failures
    fruitless: int = 0  # failures in a row that made no checkpoint
    known: tuple[str, ...] = ()  # nodes of the plan before, which had no mistake of their own
    refused: tuple[str, ...] = ()  # nodes that have come with a mistake, and are not to come again
    over: int | None = None  # all end, with this exit code

    @property
    def ranks(self) -> int:
        """All of them."""
        return sum(member.ranks for member in self.members)

    def first_rank(self, node: str) -> int:
        """The number of a member's first rank."""
        before = [member.node for member in self.members].index(node)
        return sum(member.ranks for member in self.members[:before])

    def of(self, node: str) -> Member | None:
        """A node's part; None: it does not train."""
        return next((member for member in self.members if member.node == node), None)


@dataclass(frozen=True)
class Node:
    """What a supervisor says of itself."""

    name: str  # unlike that of any other start of a supervisor
    host: str  # the address at which other nodes reach it
    slots: int  # ranks that it can have
    plan: Plan = Plan()
    next: Plan = Plan()  # that it asks all to follow, where that has a higher number
    code: int | None = None  # with which its ranks of that plan have ended; None: they have not
    leaves: bool = False

    @classmethod
    def here(cls, slots: int, host: str | None = None) -> "Node":
        """This one."""
        return cls(f"{platform.node()}-{secrets.token_hex(4)}", host or platform.node(), slots)


def _plan(tree: dict[str, Any]) -> Plan:
    members = tuple(Member(**member) for member in tree["members"])
    return Plan(**{**tree, "members": members, **{name: tuple(tree[name]) for name in ("known", "refused")}})


def read(text: str) -> Node | None:
    """What a file says; None where it has been written in part only."""
    try:
        tree: dict[str, Any] = json.loads(text)
        return Node(**{**tree, **{name: _plan(tree[name]) for name in ("plan", "next")}})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


@dataclass
class _Seen:
    stamp: int
    changed: float | None = None  # when it was seen to change; None: never, so it may be what a dead node has left
    said: Node | None = None


class Board:
    """This node's file, and those of the others.

    Args:
        run: the run folder.
        mine: what is said of this node first.
        lease: seconds without a change after which a node counts as lost.
    """

    def __init__(self, run: Path, mine: Node, lease: float):
        self.folder, self.mine, self.lease = run / NODES, mine, lease
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file, self._seen, self._left = self.folder / f"{mine.name}.json", dict[str, _Seen](), threading.Event()
        self.began = time.monotonic()
        self.say(mine)
        threading.Thread(target=self._touch, name="signs of life", daemon=True).start()

    @property
    def beat(self) -> float:
        """Seconds between two signs of life."""
        return min(1.0, self.lease / 5)

    def _touch(self) -> None:
        while not self._left.wait(self.beat):
            with contextlib.suppress(OSError):  # the others see it
                os.utime(self._file)

    def say(self, mine: Node) -> None:
        """Have all know what is new of this node. Written in place: a network file system looks again when it opens."""
        self.mine = mine
        self._file.write_text(json.dumps(asdict(mine)))

    def look(self) -> dict[str, Node]:
        """The nodes that live, by name; this one too."""
        now, living = time.monotonic(), {self.mine.name: self.mine}
        for path in self.folder.glob("*.json"):
            if path == self._file:
                continue
            try:
                with path.open() as file:
                    stamp, said = os.fstat(file.fileno()).st_mtime_ns, read(file.read())
            except (OSError, UnicodeDecodeError):  # it has left; it is no node's
                continue
            seen = self._seen.setdefault(path.stem, _Seen(stamp))
            if stamp != seen.stamp:
                seen.stamp, seen.changed = stamp, now
            seen.said = said or seen.said
            silent = now - (self.began if seen.changed is None else seen.changed)
            if seen.changed is not None and silent < self.lease and seen.said:
                living[path.stem] = seen.said
            elif silent > FORGOTTEN * self.lease:
                path.unlink(missing_ok=True)
        return living

    def leave(self) -> None:
        """This node is not there any more."""
        self._left.set()
        self._file.unlink(missing_ok=True)


def newest(nodes: Iterable[Node]) -> Plan:
    """The plan that counts: where two nodes have made one at a time, all take the same."""
    plans = [plan for node in nodes for plan in (node.plan, node.next)]
    return max(plans, key=lambda plan: (plan.number, plan.by))


def leader(living: Mapping[str, Node], plan: Plan) -> str:
    """The node that makes the next plan; "" where all leave."""
    staying = [name for name, node in sorted(living.items()) if not node.leaves and name not in plan.refused]
    trained = [member.node for member in plan.members if member.node in staying]
    return next(iter(trained or staying), "")


def share_out(nodes: Sequence[Node], most: int, fits: Callable[[int], bool]) -> tuple[Member, ...]:
    """As many ranks as the recipe can be cut into, over the nodes in their order; empty where none fits.

    Args:
        nodes: that can train.
        most: nodes that may.
        fits: whether the recipe can have a number of ranks.
    """
    left = next((n for n in range(sum(node.slots for node in nodes[:most]), 0, -1) if fits(n)), 0)
    members = []
    for node in nodes[:most]:
        ranks = min(left, node.slots)
        left -= ranks
        if ranks:
            members.append(Member(node.name, node.host, ranks))
    return tuple(members)


@dataclass(frozen=True)
class Limits:
    """What an elastic run may have."""

    least: int  # nodes
    most: int
    restarts: int  # after failures; lost nodes and new ones do not count
    fruitless: int  # failures in a row without a new checkpoint


def after_the_end(plan: Plan, living: Mapping[str, Node], step: int, limits: Limits) -> Plan:
    """The plan that was, when all its ranks that live have ended: what has been tried, and whether it is over.

    Args:
        plan: that they followed.
        living: nodes, by name.
        step: of the newest checkpoint.
        limits: of the run.
    """
    names = tuple(member.node for member in plan.members)
    if any(name in living and living[name].code == 2 for name in names):
        new = tuple(name for name in names if plan.known and name not in plan.known)
        return replace(plan, refused=plan.refused + new, over=None if new else 2)
    if any(name not in living or living[name].leaves for name in names):  # which says nothing about the run
        return replace(plan, known=names)
    starts, fruitless = plan.starts + 1, 0 if step > plan.step else plan.fruitless + 1
    over = 1 if starts > limits.restarts or fruitless >= limits.fruitless else None
    return replace(plan, known=names, starts=starts, fruitless=fruitless, over=over)
