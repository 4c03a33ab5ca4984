"""Two nodes that are namespaces of this machine: what breaks ends in time, with words, and goes on where it was."""

import os
import sys
import time

import pytest

from tools.cluster.elastic import lose_and_take_back
from tools.cluster.nodes import Cluster, Node, why_not
from tools.cluster.runs import Runs
from tools.cluster.unshared import saving_of
from tools.cluster_test import FAULTS, make, mistakes, one_node, through_faults

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.launch,
    pytest.mark.skipif(bool(why_not()), reason=f"no nodes can be made: {why_not()}"),
]
WATCH = 4.0  # seconds, where two ranks of one node take 16 for the whole run; in proportion where they take longer
IN_TEST = {"rank 0 stopped (SIGSTOP)", "cable between the nodes cut", "rank 0's node off"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cluster")
    with Cluster(folder, debian=True) as cluster:
        yield Runs(cluster, folder)


@pytest.fixture(scope="module")
def watch(runs):
    """Seconds in which a healthy rank gives a sign, also where this machine is busy; the run on one node is made."""
    began = time.monotonic()
    one_node(runs.folder)
    return min(30.0, max(1.0, (time.monotonic() - began) / 16) * WATCH)


@pytest.mark.timeout(600)  # five starts of two ranks, and what each fault has to wait for
def test_faults_end_in_time_and_four_launchers_make_the_run_of_one_node(runs, watch):
    """Each fault breaks the run of another launcher, the next one goes on; `deepspeed` brings it to its end.

    The nodes share no run folder: that of rank 0 keeps all.
    """
    faults = [fault for fault in FAULTS if fault.name in IN_TEST]
    assert {fault.launcher for fault in faults} == {"by hand", "SLURM", "torchrun"}
    rows = through_faults(runs, runs.folder, faults, watch, apart=True)
    for row in rows:
        assert 0.6 * watch < row.seconds < watch + 15 * watch / WATCH  # a sign may have been on its way
        assert row.lost is not None
        assert row.lost <= 8
    saving = saving_of(runs, runs.folder / "apart" / "broken")
    assert saving.checkpoints >= 10
    assert 0.3 * saving.bytes < saving.sent < 0.7 * saving.bytes  # half of what is cut over two ranks


def test_an_elastic_run_goes_on_without_a_node_and_takes_it_back(runs, watch):
    """Each start has the very losses of a run from its checkpoint on as many ranks that nobody disturbs."""
    lost, back = lose_and_take_back(runs, runs.folder, watch=120, both=False)
    assert (lost.ranks, back.ranks) == (1, 2)
    assert lost.seconds < 60 * watch / WATCH
    assert lost.lost <= 8


@pytest.mark.parametrize("number", range(5))
def test_a_mistake_on_one_node_is_told_on_both(runs, number):
    made = make(runs, mistakes(runs.folder)[number], runs.folder)
    assert made.seconds < 60


RUNNER = """
import os, subprocess, sys
from pathlib import Path
run = Path(sys.argv[1])
if (run / "once").exists():
    (run / "evaluation.json").write_text("{}")
else:
    (run / "once").touch()
    subprocess.Popen(["sleep", "60"])
    os.kill(os.getpid(), 9)
"""


def test_a_runner_that_is_killed_is_started_again_where_nobody_buries_the_dead(tmp_path):
    """Its orphan stays as a zombie: the first process of the node does not ask how it has ended."""
    node = Node(1, tmp_path, "127.0.0.1 localhost\n")
    try:
        (tmp_path / "a").mkdir()
        words = ["-m", "amclr_scale", "supervise", "--pause", "0", "--", sys.executable, "-c", RUNNER]
        words += [str(tmp_path / "a"), f"run.folder={tmp_path}", "run.name=a", "resume=auto"]
        began = time.monotonic()
        run = node.start([sys.executable, *words], tmp_path / "log", {"PYTHONPATH": os.getcwd()})
        assert run.wait(60) == 0, (tmp_path / "log").read_text()
        assert time.monotonic() - began < 15
    finally:
        node.switch_off()
