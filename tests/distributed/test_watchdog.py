"""A rank that hangs is named by the others, which end in a bounded time; rank 0 too, though it keeps the store."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.watchdog import BEAT, Watchdog

pytestmark = pytest.mark.launch

ROOT = Path(__file__).parents[2]
RANK = """
import os, sys, time
import torch, torch.distributed as dist
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.watchdog import Watchdog

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=3)
watchdog = Watchdog(RankInfo(rank, rank, 3, 3), limit=2.0, beat=0.2)
print("up", flush=True)
if sys.argv[3] == "leave" or (sys.argv[3] == "all but 0 leave" and rank):
    watchdog.leave()
    sys.exit(0)
if sys.argv[3] == f"mistake of {rank}":
    watchdog.announce("data.train: expected words")
    os._exit(2)
dist.barrier() if rank else time.sleep(60)
"""


def start(tmp_path, what):
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), what],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(3)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("lost", "words", "what"),
    [
        (2, "rank 2 (HOST) has given no sign of life for 2 s", "stay"),
        (0, "rank 0 (HOST) at 127.0.0.1 has not answered for 2 s", "stay"),
        (0, "rank 0 (HOST) at 127.0.0.1 has not answered for 2 s", "all but 0 leave"),
    ],
    ids=["another", "rank 0", "rank 0 before it leaves"],
)
def test_a_rank_that_hangs_is_named(tmp_path, lost, words, what):
    ranks = start(tmp_path, what)
    for rank in ranks:
        assert rank.stdout.readline() == "up\n"
    ranks[lost].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for number in {0, 1, 2} - {lost}:
        _, said = ranks[number].communicate(timeout=30)
        assert ranks[number].returncode == 1
        assert words.replace("HOST", os.uname().nodename) in said
    assert time.monotonic() - began < 15
    ranks[lost].kill()
    ranks[lost].communicate()


@pytest.mark.parametrize("one", [0, 1])
def test_a_mistake_of_one_rank_ends_all_with_its_words(tmp_path, one):
    """Rank 0 keeps the store: it stays until the others have read it."""
    ranks = start(tmp_path, f"mistake of {one}")
    for number, rank in enumerate(ranks):
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == 2, said
        told = f"rank {number} ends: rank {one} ({os.uname().nodename}): data.train: expected words"
        assert (told in said) == (number != one), said


def test_leaving_is_not_dying(tmp_path):
    for rank in start(tmp_path, "leave"):
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == 0, said


def test_a_short_limit_has_short_beats():
    """Four in a limit at least: one that is late is no death."""
    alone = RankInfo(rank=0, world_size=1, local_rank=0)
    assert Watchdog(alone, limit=2.0).beat == 0.5
    assert Watchdog(alone, limit=120.0).beat == BEAT
    assert Watchdog(alone, limit=2.0).reading == 2.0
