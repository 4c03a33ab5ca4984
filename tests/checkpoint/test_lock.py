"""Two jobs never write one run folder; a lock that nobody holds any more stands in nobody's way."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from amclr_scale.checkpoint import lock as module
from amclr_scale.checkpoint.lock import HOLDER, RunLock
from amclr_scale.errors import UserError
from tests.checkpoint.trainer import ROOT

pytestmark = pytest.mark.launch

HOLD = """
import sys, time
from pathlib import Path
from amclr_scale.checkpoint.lock import RunLock
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
with RunLock.join(folder, rank, "t") if rank else RunLock.take(folder):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, rank=0):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(rank)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "ENDING", 0.3)


def test_the_second_job_is_refused_until_the_first_is_killed(tmp_path):
    first = hold(tmp_path / "run")
    with pytest.raises(UserError) as refused:
        RunLock.take(tmp_path / "run")
    assert str(refused.value).startswith(f"run.name: {tmp_path}/run is being written by another job")
    assert f"process {first.pid} on " in str(refused.value)
    first.send_signal(signal.SIGKILL)
    first.wait()
    began = time.monotonic()
    with RunLock.take(tmp_path / "run"):
        assert time.monotonic() - began < 0.3
        assert json.loads((tmp_path / "run" / HOLDER).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / HOLDER).exists()


def test_a_rank_that_is_left_of_a_job_keeps_the_next_one_out(tmp_path):
    (tmp_path / HOLDER).write_text('{"token": "t"}')
    left = hold(tmp_path, rank=3)
    with pytest.raises(UserError, match="being written by another job"):
        RunLock.take(tmp_path)
    left.kill()
    left.wait()
    with RunLock.take(tmp_path):
        pass


def test_a_job_that_is_just_ending_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ENDING", 20.0)
    first = hold(tmp_path)
    subprocess.Popen(["/bin/sh", "-c", f"sleep 0.5; kill -9 {first.pid}"])
    with RunLock.take(tmp_path):
        assert first.wait() == -signal.SIGKILL


def child(folder, ready, end):
    ready.set()
    end.wait(30)


def test_a_forked_worker_does_not_keep_it(tmp_path):
    fork = multiprocessing.get_context("fork")
    ready, end = fork.Event(), fork.Event()
    with RunLock.take(tmp_path):
        worker = fork.Process(target=child, args=(tmp_path, ready, end))
        worker.start()
        assert ready.wait(30)
    other = hold(tmp_path)  # though the worker lives
    assert worker.is_alive()
    end.set()
    worker.join()
    other.kill()
    other.wait()


def holder(folder, machine, pid, started=0.0):
    (folder / HOLDER).write_text(
        json.dumps({"host": "node7", "machine": machine, "pid": pid, "started": started, "since": "then"})
    )


def no_locks(*_):
    raise OSError(errno.ENOSYS, "Function not implemented")


def test_without_locks_the_process_of_this_machine_decides(tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", no_locks)
    first = hold(tmp_path)
    with pytest.raises(UserError, match=f"process {first.pid} on "):
        RunLock.take(tmp_path)
    first.kill()
    first.wait()
    with RunLock.take(tmp_path):
        pass
    holder(tmp_path, module._machine(), os.getppid())  # the number is used again, by a process that began later
    with RunLock.take(tmp_path):
        pass


@pytest.mark.parametrize("locks", [True, False])
def test_a_job_on_another_machine_counts_while_it_touches_its_file(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr("fcntl.lockf", no_locks)
    monkeypatch.setattr(module, "BEAT", 0.1)
    monkeypatch.setattr(module, "STALE", 0.6)
    holder(tmp_path, "elsewhere", 1)
    began = time.monotonic()
    with RunLock.take(tmp_path):  # nobody touches it
        assert 0.4 < time.monotonic() - began < 5
        words = (tmp_path / HOLDER).read_text()
        first = (tmp_path / HOLDER).stat().st_mtime
        time.sleep(0.3)
        assert (tmp_path / HOLDER).stat().st_mtime > first  # we do
        monkeypatch.setattr(module, "_machine", lambda: "a third")
        monkeypatch.setattr("fcntl.lockf", no_locks)
        with pytest.raises(UserError, match="being written by another job"):
            RunLock.take(tmp_path)
        assert (tmp_path / HOLDER).read_text() == words
    holder(tmp_path, "elsewhere", 1)
    os.utime(tmp_path / HOLDER, (0, 0))
    began = time.monotonic()
    with RunLock.take(tmp_path):  # long dead: nothing to wait for
        assert time.monotonic() - began < 0.4


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.folder: .*cannot be written"):
        RunLock.take(tmp_path / "file" / "run")
