"""A rank that waits for others says so, and a port that is taken is told in words."""

import re
import socket
import time

import pytest
import torch.distributed as dist

from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.distributed.process_group import told_while_joining
from amclr_scale.errors import UserError


def test_waiting_for_others_is_said(monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with told_while_joining(RankInfo(0, 0, 4, 4), first=0.05, every=0.1):
        time.sleep(0.4)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 2
    for line in lines:
        assert re.fullmatch(r"rank 0 has waited \d+ s for the other 3 of 4 ranks to come to node1:29500", line)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")
    with told_while_joining(RankInfo(0, 0, 4, 4), first=0.05):
        time.sleep(0.2)
    assert "started from an interactive srun shell?" in capfd.readouterr().err
    with told_while_joining(RankInfo(1, 1, 4, 4), first=0.05):  # one voice per node
        time.sleep(0.1)
    with told_while_joining(RankInfo(), first=0.05):
        time.sleep(0.1)
    assert not capfd.readouterr().err


def test_a_port_that_is_taken(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        told = rf"^MASTER_PORT: expected a free port on 127.0.0.1, got {port}, on which"
        with pytest.raises(UserError, match=told), told_while_joining(RankInfo(0, 0, 2, 2)):
            dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
