"""An elastic run goes on without the supervisors that are lost, and takes others in; here all are on one machine."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from amclr_scale.commands.supervise import main as supervise
from amclr_scale.commands.supervising import elastic
from amclr_scale.commands.supervising.elastic import Elastic, Options, fitting, nodes_of, slots_of
from amclr_scale.commands.supervising.looks import begin, run_of
from amclr_scale.distributed.membership import (
    Board,
    Limits,
    Member,
    Node,
    Plan,
    after_the_end,
    leader,
    newest,
    read,
    share_out,
)
from amclr_scale.errors import UserError
from tests.checkpoint.trainer import ROOT

LIMITS = Limits(least=1, most=4, restarts=10, fruitless=3)
LEASE = 1.5  # seconds

# A rank: notes that it is there, saves when it is asked to end, ends with the code that a file says.
RANK = """
import os, signal, sys, time
from pathlib import Path
from amclr_scale.distributed.network import handed_over
run = Path(sys.argv[1])
rank, world = os.environ["RANK"], os.environ["WORLD_SIZE"]
def end(*_):
    (run / "checkpoints" / f"step_{time.time_ns() // 10**6 % 10**8:08d}").mkdir(parents=True, exist_ok=True)
    sys.exit(75)
signal.signal(signal.SIGTERM, end)
with (run / "ranks").open("a") as file:
    file.write(f"{rank}/{world} {os.environ['MASTER_PORT']} {os.getpid()}\\n")
assert (rank == "0") == (handed_over(int(os.environ["MASTER_PORT"])) is not None)
while True:
    time.sleep(0.05)
    if (run / f"mistake{world}").exists():
        sys.exit(2)
    if (run / f"kill{world}.{rank}").exists():
        (run / f"kill{world}.{rank}").unlink()
        os.kill(os.getpid(), 9)
    if (run / "done").exists():
        if rank == "0":
            (run / "evaluation.json").write_text("{}")
        sys.exit(0)
"""


class Supervised:
    """Supervisors of one run, each on a node of its own as far as they know."""

    def __init__(self, folder):
        self.folder, self.run, self.processes = folder, folder / "a", []
        self.run.mkdir()

    def start(self, slots=1, *options):
        words = [str(self.run), "train", "--config", "quickstart", f"run.folder={self.folder}", "run.name=a",
                 "resume=auto"]  # fmt: skip
        command = [sys.executable, "-m", "amclr_scale", "supervise", "--elastic", "--nnodes", "1:2", "--lease",
                   str(LEASE), "--gather", "0", "--pause", "0", f"--nproc-per-node={slots}", *options, "--",
                   sys.executable, "-c", RANK, *words]  # fmt: skip
        self.processes.append(subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE))
        return self.processes[-1]

    def came(self):
        """The ranks that have come, in groups that met at one port."""
        groups = {}
        for line in (self.run / "ranks").read_text().splitlines() if (self.run / "ranks").exists() else ():
            rank, port, _ = line.split()
            groups.setdefault(port, []).append(rank)
        return [sorted(group) for group in groups.values()]

    def until(self, *group, times=1):
        """Wait for a group of ranks."""
        until = time.monotonic() + 30
        while self.came().count(sorted(group)) < times:
            assert time.monotonic() < until, (self.came(), [one.poll() for one in self.processes])
            time.sleep(0.05)

    def end(self):
        for process in self.processes:
            process.kill()
        for line in (self.run / "ranks").read_text().splitlines() if (self.run / "ranks").exists() else ():
            try:
                os.kill(int(line.split()[-1]), signal.SIGKILL)
            except ProcessLookupError:
                continue


@pytest.fixture
def supervised(tmp_path):
    found = Supervised(tmp_path)
    yield found
    found.end()


@pytest.mark.launch
def test_nodes_are_lost_and_come_back(supervised):
    first, second = (supervised.start(1, "--gather", "25") for _ in range(2))  # neither begins alone
    supervised.until("0/2", "1/2")
    second.kill()  # with signal 9: its rank is left, and cannot do any harm
    supervised.until("0/1")
    third = supervised.start()
    supervised.until("0/2", "1/2", times=2)
    for rank in (0, 1):  # both are killed on nodes that live: all start again
        (supervised.run / f"kill2.{rank}").touch()
    supervised.until("0/2", "1/2", times=3)
    first.send_signal(signal.SIGTERM)  # leaves; the other one goes on
    assert first.wait(20) == 75
    supervised.until("0/1", times=2)
    (supervised.run / "done").touch()
    assert third.wait(20) == 0
    said = first.stderr.read() + third.stderr.read()
    assert "has left, or is lost: no sign of life for 1.5 s" in said
    assert "start 2 on 1 rank (" in said
    assert "has come" in said
    assert "start 4 on 2 ranks (" in said
    assert [len(group) for group in supervised.came()] == [2, 1, 2, 2, 1]  # no start too many


@pytest.mark.launch
def test_a_node_that_comes_with_a_mistake_is_sent_away_and_a_mistake_of_all_ends_all(supervised):
    first = supervised.start()
    supervised.until("0/1")
    (supervised.run / "mistake2").touch()
    second = supervised.start()
    assert second.wait(30) == 2
    supervised.until("0/1", times=2)
    (supervised.run / "mistake1").touch()
    assert first.wait(30) == 2


@pytest.mark.launch
def test_ctrl_c_ends_all(supervised):
    both = [supervised.start(), supervised.start()]
    supervised.until("0/2", "1/2")
    both[1].send_signal(signal.SIGINT)
    assert [one.wait(20) for one in both] == [75, 75]


def a_node(name, slots=1, **keys):
    return Node(name, f"host {name}", slots, **keys)


def test_as_many_ranks_as_the_recipe_can_be_cut_into():
    nodes = [a_node("a", 3), a_node("b", 3), a_node("c", 3)]
    members = share_out(nodes, 4, lambda ranks: 8 % ranks == 0)
    assert [(member.node, member.ranks) for member in members] == [("a", 3), ("b", 3), ("c", 2)]
    members = share_out(nodes[:2], 4, lambda ranks: 8 % ranks == 0)
    assert [(member.node, member.ranks) for member in members] == [("a", 3), ("b", 1)]
    plan = Plan(members=members)
    assert (plan.ranks, plan.first_rank("b"), plan.of("c")) == (4, 3, None)
    assert [member.node for member in share_out(nodes, 1, lambda _: True)] == ["a"]
    assert share_out(nodes[:2], 1, lambda ranks: ranks == 5) == ()


def test_who_leads_and_which_plan_counts():
    plan = Plan(3, by="c", members=(Member("c", "", 1), Member("b", "", 1)))
    living = {name: a_node(name) for name in "abc"}
    assert leader(living, Plan()) == "a"
    assert leader(living, plan) == "c"  # not one that has just come
    assert leader({**living, "c": a_node("c", leaves=True)}, plan) == "b"
    assert leader({"a": living["a"]}, plan) == "a"
    assert leader({}, plan) == ""
    other = Plan(3, by="b")
    for order in ((plan, other), (other, plan)):
        assert newest([a_node("x", plan=order[0]), a_node("y", next=order[1])]) == plan


def test_what_is_tried_again_and_how_often():
    members = (Member("a", "", 1), Member("b", "", 1))
    plan = Plan(4, members=members, step=10, known=("a",))

    def after(codes, step=10, **keys):
        living = {name: a_node(name, code=code, leaves=code == 75) for name, code in codes.items()}
        return after_the_end(Plan(4, members=members, step=10, **keys), living, step, LIMITS)

    assert after_the_end(plan, {"a": a_node("a", code=2), "b": a_node("b", code=2)}, 10, LIMITS).refused == ("b",)
    assert after({"a": 2, "b": 1}).over == 2
    assert after({"a": 2, "b": 2}, known=("a", "b")).over == 2
    assert (after({"a": 1}).starts, after({"a": 75, "b": 75}).starts) == (0, 0)  # a node was lost, one leaves
    failed = after({"a": 1, "b": -9}, fruitless=1)
    assert (failed.starts, failed.fruitless, failed.over, failed.known) == (1, 2, None, ("a", "b"))
    assert after({"a": 1, "b": -9}, fruitless=2).over == 1
    assert after({"a": 1, "b": -9}, step=11, fruitless=2).fruitless == 0
    assert after({"a": 1, "b": -9}, step=11, starts=10).over == 1


def test_a_node_lives_while_its_file_changes_whatever_the_clocks_say(tmp_path):
    mine = Board(tmp_path, Node.here(1), lease=0.6)
    for name, hours in (("fast", 9), ("dead", 0)):
        (mine.folder / f"{name}.json").write_text((mine.folder / f"{mine.mine.name}.json").read_text())
        os.utime(mine.folder / f"{name}.json", (0, time.time() + 3600 * hours))
    assert set(mine.look()) == {mine.mine.name}  # what a run before may have left
    os.utime(mine.folder / "fast.json", (0, time.time() - 3600 * 9))
    assert set(mine.look()) == {mine.mine.name, "fast"}
    (mine.folder / "fast.json").write_text("{")  # half of it
    assert mine.look()["fast"].slots == 1
    other = Board(tmp_path, Node.here(3), lease=0.6)
    time.sleep(0.7)
    assert set(mine.look()) == {mine.mine.name}
    time.sleep(0.2)
    assert set(mine.look()) == {mine.mine.name, other.mine.name}
    other.leave()
    (mine.folder / "foreign.json").write_bytes(b"\xff")
    assert set(mine.look()) == {mine.mine.name}
    mine.leave()


def test_what_a_node_says_is_read_back():
    plan = Plan(2, "a", (Member("a", "h", 2),), 29500, 7, 1, 2, ("a",), ("b",), 1)
    node = Node("a", "h", 2, plan, Plan(3), 75, True)
    assert read(json.dumps(asdict(node))) == node
    assert read("{}") is None


def test_options_that_are_none():
    assert (nodes_of("1:4"), nodes_of("2"), slots_of("8")) == ((1, 4), (2, 2), 8)
    for wrong in ("0:2", "3:2", "x", "1:x"):
        with pytest.raises(UserError, match=r"^--nnodes: expected MIN:MAX"):
            nodes_of(wrong)
    for wrong in ("0", "²"):
        with pytest.raises(UserError, match=r"^--nproc-per-node: expected a number"):
            slots_of(wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--nnodes", "2:4"], "--nnodes: expected it beside --elastic, got 2:4 without"),
        (["--nproc-per-node", "8"], "--nproc-per-node: expected it beside --elastic"),
        (["--elastic", "--lease", "0"], "--lease: expected more than 0, got 0"),
        (["--elastic", "--gather", "nan"], "--gather: expected at least 0, got nan"),
        (["--restarts", "-1"], "--restarts: expected at least 0, got -1"),
        (["--pause", "-1"], "--pause: expected at least 0, got -1"),
    ],
)
def test_options_that_would_be_passed_over(options, words, tmp_path, capsys):
    assert supervise([*options, "--", "false", f"run.folder={tmp_path}", "run.name=a", "resume=auto"]) == 2
    assert words in capsys.readouterr().err


def test_commands_that_start_no_rank(tmp_path):
    with pytest.raises(UserError, match=r"^command: expected a program to start, got .*none \(No such file"):
        begin([str(tmp_path / "none"), "train"])
    for launcher in (["deepspeed", "launch/train.py"], ["srun", "amclr-scale", "train"]):
        with pytest.raises(UserError, match=r"^command: expected the command of one rank"):
            fitting([*launcher, "--config", "quickstart"])
    with pytest.raises(UserError, match=r"^run\.shared: expected true with --elastic, got false: any node may be lost"):
        fitting(["train", "--config", "quickstart", "run.shared=false"])


def test_the_run_folder_may_be_named_in_the_file(tmp_path):
    (tmp_path / "base.yaml").write_text("run: {folder: far}")
    (tmp_path / "a.yaml").write_text("base: base.yaml")
    words, file = ["run.name=a", "resume=auto"], str(tmp_path / "a.yaml")
    for command in (["train", "--config", file, *words], ["train", f"--config={file}", *words]):
        assert str(run_of(command)) == "far/a"
        assert str(run_of([*command, "run.folder=near"])) == "near/a"
    for command in (words, ["train", *words, "--config"], ["train", "--config", str(tmp_path / "none.yaml"), *words]):
        assert str(run_of(command)) == "runs/a"


class Child:
    """A rank that never ends, and what it was sent."""

    pid = 0

    def __init__(self, *_):
        self.sent = []

    def poll(self):
        return None

    def send_signal(self, number):
        self.sent.append(number)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A supervisor that nobody runs, of ranks that nobody starts."""
    monkeypatch.setattr(elastic, "begin", Child)
    command = ["amclr-scale", "train", "--config", "quickstart", f"run.folder={tmp_path}", "run.name=a", "resume=auto"]
    found = Elastic(command, Options(LIMITS, 1, None, 60.0, 0.0, 0.0))
    yield found
    found.board.leave()


def test_ranks_that_save_for_the_next_plan_are_asked_once(alone):
    def follow(number):
        plan = Plan(number, "b", (Member(alone.name, "h", 1),), step=1)
        alone.follow({alone.name: alone.board.mine, "b": a_node("b", plan=plan)})

    follow(1)
    (child,) = alone.ranks._children
    assert child.sent == []
    for number in (2, 2, 3):
        follow(number)
        assert child.sent == [signal.SIGTERM]  # a second request would end them unsaved
    alone.received.append(signal.SIGUSR1)
    alone.heed_signals()
    assert (child.sent, alone.board.mine.leaves) == ([signal.SIGTERM], True)
    alone.received.append(signal.SIGTERM)
    alone.heed_signals()
    assert child.sent == [signal.SIGTERM] * 2  # who asks this supervisor twice wants that


def test_who_waits_says_for_what(alone, capsys):
    alone.fits, alone.said_at = (lambda _: False), float("-inf")
    alone.propose(Plan(), [a_node("a", 3)])
    assert "host a here; waiting for more: the recipe cannot be cut into 3 ranks or fewer" in capsys.readouterr().err
    alone.options, alone.said_at = Options(Limits(2, 4, 10, 3), 1, None, 60.0, 0.0, 0.0), float("-inf")
    alone.propose(Plan(), [a_node("a", 3)])
    assert "host a here; waiting for 2 nodes" in capsys.readouterr().err
