"""A command is started again until it is done, and not for ever."""

import signal
import subprocess
import sys
import time

import pytest

from amclr_scale.checkpoint import files
from tests.checkpoint.trainer import ROOT

pytestmark = pytest.mark.launch

# Makes a checkpoint at each start; ends well at the third, and with the code it is told before.
COMMAND = """
import sys
from pathlib import Path
run, what = Path(sys.argv[1]), sys.argv[2]
run.mkdir(exist_ok=True)
starts = len(list(run.glob("start*"))) + 1
(run / f"start{starts}").touch()
if what == "progress":
    (run / "checkpoints" / f"step_{starts:08d}").mkdir(parents=True)
    if starts == 3:
        (run / "evaluation.json").write_text("{}")
        sys.exit(0)
if what == "sleep":
    print("up", flush=True)
    import time
    time.sleep(60)
sys.exit({"mistake": 2, "nothing said": 0}.get(what, 1))
"""


def start(tmp_path, what, *options, **keys):
    words = [str(tmp_path / "a"), what, f"run.folder={tmp_path}", "run.name=a", "resume=auto"]
    command = [
        sys.executable,
        "-m",
        "amclr_scale",
        "supervise",
        "--pause",
        "0",
        *options,
        "--",
        sys.executable,
        "-c",
        COMMAND,
        *words,
    ]
    return subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE, **keys)


def starts(tmp_path):
    return len(list((tmp_path / "a").glob("start*")))


def test_restarts_until_done(tmp_path):
    run = start(tmp_path, "progress")
    assert run.wait(60) == 0, run.stderr.read()
    assert starts(tmp_path) == 3
    assert files.steps(tmp_path / "a" / "checkpoints")[0] == 3


def test_a_mistake_is_not_tried_again(tmp_path):
    assert start(tmp_path, "mistake").wait(60) == 2
    assert starts(tmp_path) == 1


def test_gives_up_without_progress_and_without_restarts(tmp_path):
    assert start(tmp_path, "nothing").wait(60) == 1
    assert starts(tmp_path) == 3
    (tmp_path / "b").mkdir()
    assert start(tmp_path / "b", "progress", "--restarts", "1").wait(60) == 1
    assert starts(tmp_path / "b") == 2


def test_a_command_that_ends_with_0_without_a_result_has_crashed(tmp_path):
    """As the deepspeed command does when its pdsh is killed."""
    assert start(tmp_path, "nothing said").wait(60) == 1
    assert starts(tmp_path) == 3


def test_a_signal_on_one_node_ends_the_supervisors_of_all(tmp_path):
    waiting = start(tmp_path, "nothing", "--pause", "600")  # its ranks have ended with the others
    assert "start 1 ended with 1" in waiting.stderr.readline() + waiting.stderr.readline()
    asked = start(tmp_path, "sleep", stdout=subprocess.PIPE)
    assert asked.stdout.readline() == "up\n"
    asked.send_signal(signal.SIGTERM)
    assert asked.wait(30) == 75
    assert waiting.wait(10) == 75
    assert starts(tmp_path) == 2


def test_a_signal_is_passed_on_and_ends_it(tmp_path):
    run = start(tmp_path, "sleep", stdout=subprocess.PIPE)
    assert run.stdout.readline() == "up\n"
    began = time.monotonic()
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 75
    assert time.monotonic() - began < 20
    assert starts(tmp_path) == 1


def test_a_signal_between_two_starts_ends_it_too(tmp_path):
    run = start(tmp_path, "nothing", "--pause", "600")
    assert "start 1 ended with 1" in run.stderr.readline() + run.stderr.readline()
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 75
    assert starts(tmp_path) == 1


def test_the_command_must_be_resumable():
    command = [sys.executable, "-m", "amclr_scale", "supervise", "--", "true", "run.name=a"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "resume=auto" in done.stderr
