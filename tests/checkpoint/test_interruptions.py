"""The command as a user's scheduler treats it: killed, sent signals, run out of time, started again."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from amclr_scale.checkpoint import files
from amclr_scale.distributed.launcher import SUPERVISED
from tests.checkpoint.trainer import ROOT
from tests.commands.test_train import LAUNCHERS, SMALL, free_port, probed

pytestmark = pytest.mark.launch


def launch(folder, *words, launcher="deepspeed"):
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    words = [*SMALL, f"run.folder={folder}", "run.name=a", "resume=auto", *words]
    return subprocess.Popen(
        [*LAUNCHERS[launcher](), "launch/train.py", *words], cwd=ROOT, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for(run, start):
    """Read until a line that begins so."""
    return next(line for line in run.stdout if line.startswith(start))


def steps(folder):
    lines = map(json.loads, (folder / "a" / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if "loss" in line]


def test_kills_leave_no_trace():
    command = [sys.executable, "tools/kill_test.py", "--kills", "2", "--seed", "4", "--steps", "40"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert told["victims"] == ["rank 0", "launcher"]
    assert told["in_save"] >= 1
    assert told["different"] == []


LAUNCHER = """
import os, subprocess, sys, time
rank = subprocess.Popen([sys.executable, "launch/train.py", *sys.argv[1:]], env={**os.environ, "RANK": "0"})
print(rank.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "1", SUPERVISED: "1"}])
def test_a_rank_ends_with_a_launcher_that_dies_while_it_imports(tmp_path, variables):
    """One rank by itself too, if it is a supervisor that started it: another node may go on with its run."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "LOCAL_RANK": "0", **variables}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}  # where rank 1 never comes
    words = [*SMALL, f"run.folder={tmp_path}"]
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, *words], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    rank = psutil.Process(int(launcher.stdout.readline()))
    while not any("libtorch" in map.path for map in rank.memory_maps()):  # its imports have begun
        time.sleep(0.01)
    launcher.kill()
    launcher.wait()
    gone, _ = psutil.wait_procs([rank], timeout=10)
    if not gone:
        rank.kill()
    assert gone
    assert not list(tmp_path.iterdir())  # it has not ended because it was done


def test_a_command_that_is_ended_saves_and_goes_on(tmp_path):
    run = launch(tmp_path, "train.samples=32000", "execution.workers=1")
    stop = wait_for(run, "to stop: ").split()
    wait_for(run, "step ")
    beside = launch(tmp_path, "train.samples=32000", launcher="python")  # a second job on the same folder
    said, _ = beside.communicate(timeout=60)
    assert beside.returncode == 2
    assert f"run.name: {tmp_path}/a is being written by another job" in said
    assert "Traceback" not in said
    assert psutil.Process(int(stop[5])).cmdline()[2:4] == ["launch/train.py", "--local_rank=0"]
    run.terminate()  # the command alone, which tells nobody
    said, _ = run.communicate(timeout=60)  # until all that were started by it are gone
    checkpoints = tmp_path / "a" / "checkpoints"
    (saved,) = files.steps(checkpoints)
    assert f"the deepspeed command has ended; saved after step {saved}" in said
    assert steps(tmp_path) == list(range(1, saved + 1))

    # the same recipe on one rank and at another stage; Ctrl-C reaches all that a terminal has started
    again = launch(tmp_path, "train.samples=32000", "execution.workers=1", "execution.zero_stage=2", launcher="python")
    assert f"resumed from {checkpoints / files.name_of(saved)}" in wait_for(again, "note: resumed")
    wait_for(again, "step ")
    os.killpg(again.pid, signal.SIGINT)
    said = ""
    while "saved after step" not in said:
        said += next(again.stdout)
    while again.poll() is None:  # Ctrl-C again and again, until Python and its libraries are gone
        again.send_signal(signal.SIGINT)
        time.sleep(0.02)
    said += again.stdout.read()
    assert again.returncode == 75, said
    assert "SIGINT came: the run saves after the present step and ends; once more, and it ends at once" in said
    assert "Traceback" not in said
    before, saved = saved, files.steps(checkpoints)[0]
    assert saved > before
    assert f"SIGINT came; saved after step {saved}" in said
    assert steps(tmp_path) == list(range(1, saved + 1))

    # a changed recipe is refused in words, before anything is trained
    refused = launch(tmp_path, "train.samples=32000", "optimizer.lr=0.5", launcher="python")
    said, _ = refused.communicate(timeout=60)
    assert refused.returncode == 2
    assert "resume_changed=optimizer.lr" in said
    assert "optimizer.lr: 0.002 in the checkpoint, 0.5 now" in said
    assert "Traceback" not in said


def test_a_resumed_run_measures_the_drift_that_the_whole_run_measures(tmp_path):
    """Also on another number of ranks: the last measurement is in the checkpoint."""
    words = ["run.probe.samples=128", "run.probe.every_samples=256", "checkpoint.every_samples=320"]
    run = launch(tmp_path, *words, launcher="python")
    said, _ = run.communicate(timeout=120)
    assert run.returncode == 0, said
    whole = probed(tmp_path / "a")
    assert [("probe/drift_image" in whole[step], "probe/drift_text" in whole[step]) for step in (8, 16, 20)] == [
        (False, False), (True, True), (True, True)
    ]  # fmt: skip
    assert 0 < whole[20]["probe/drift_image"] < whole[16]["probe/drift_image"] < 4  # four steps of a falling rate

    shutil.rmtree(tmp_path / "a" / "checkpoints" / files.name_of(20))  # back to step 10, after the first measurement
    again = launch(tmp_path, *words, launcher="torchrun")
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0, said
    resumed = probed(tmp_path / "a")
    assert list(resumed) == [8, 16, 20]
    for step, found in resumed.items():
        assert found == pytest.approx(whole[step], rel=1e-3)
