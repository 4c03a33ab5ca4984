"""A rank without a device of its own is told so before any process waits for another."""

import os
import subprocess
import sys
from datetime import timedelta
from unittest import mock

import pytest
import torch

from amclr_scale.distributed import process_group
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import keep_float32, start
from amclr_scale.errors import UserError


def test_more_ranks_than_devices(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    visible = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 1)
    with (
        visible,
        pytest.raises(UserError, match=r"^CUDA_VISIBLE_DEVICES: .* 8 ranks .* got 1 for local rank 3; .*gpus-per-node"),
    ):
        start(RankInfo(rank=3, local_rank=3, world_size=8, local_world_size=8))
    assert not torch.distributed.is_initialized()


def test_float32_stays_float32(monkeypatch):
    """torch lets convolutions round to TF32 unless it is told not to."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    keep_float32()
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32


def test_nccl_s_messages_may_take_as_long_as_gloo_s(monkeypatch):
    """Where ranks wait for the last save, its own default of ten minutes would end them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(process_group, "meet", lambda *_, **__: ("store", ["a", "b"]))
    for name in (
        "DS_ACCELERATOR",
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        monkeypatch.setenv(name, "1")  # what `start` sets does not stay
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    asked = {}

    def init(backend, **how):
        asked.update(how, backend=backend)
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(KeyboardInterrupt):
        start(RankInfo(rank=1, local_rank=0, world_size=2, local_world_size=1))
    assert asked["backend"] == "nccl"
    assert asked["timeout"] == timedelta(minutes=30)
    assert "device_id" not in asked  # the first message, which is watched, makes the connections


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("4,2", 4), ("", 2), ("0", 2), ("many", 2), (None, 2)])
def test_threads_of_a_rank_that_nobody_gave_any(monkeypatch, said, threads):
    """torchrun says OMP_NUM_THREADS, and so do users; else the machine's cores are divided among its ranks."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("OMP_NUM_THREADS", said or "")
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert process_group._threads_here() == threads


HOLDER = """
import subprocess, sys
from amclr_scale.commands.supervising.looks import begin
from amclr_scale.distributed.launcher import environments
from amclr_scale.distributed.network import HeldPort
port = HeldPort()
(one,) = environments("localhost", port.number, 1, 0, 1)
rank = begin([sys.executable, "-c", sys.argv[1]], one | port.variables_for(one))
port.close()
print(rank.wait())
"""
RANK = """
import os, socket, sys
import torch.distributed as dist
from amclr_scale.distributed.launcher import SUPERVISED, read_rank_info
from amclr_scale.distributed.process_group import start, stop
port = int(os.environ["MASTER_PORT"])
try:
    socket.create_server(("", port))
    sys.exit("the port could be taken")
except OSError:
    assert SUPERVISED in os.environ
start(read_rank_info(), 1)
assert dist.get_world_size() == 1
store = dist.TCPStore("localhost", port, is_master=False)
store.set("there", "yes")
stop()
"""


@pytest.mark.slow
def test_a_port_that_a_supervisor_holds_goes_to_rank_0():
    """From when it was chosen on, nobody else could take it."""
    done = subprocess.run(
        [sys.executable, "-c", HOLDER, RANK], env={**os.environ, "DS_ACCELERATOR": "cpu"}, capture_output=True,
        text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip().splitlines()[-1] == "0", done.stdout + done.stderr
