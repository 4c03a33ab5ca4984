"""A rank that hangs is named by the others, which end in a bounded time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

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
if sys.argv[3] == "leave":
    watchdog.leave()
    sys.exit(0)
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


def test_a_rank_that_hangs_is_named(tmp_path):
    ranks = start(tmp_path, "stay")
    for rank in ranks:
        assert rank.stdout.readline() == "up\n"
    ranks[2].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    for rank in ranks[:2]:
        _, said = rank.communicate(timeout=30)
        assert rank.returncode == 1
        assert "rank 2 has given no sign of life for 2 s" in said
    assert time.monotonic() - began < 15
    ranks[2].kill()
    ranks[2].communicate()


def test_leaving_is_not_dying(tmp_path):
    for rank in start(tmp_path, "leave"):
        _, said = rank.communicate(timeout=60)
        assert rank.returncode == 0, said
