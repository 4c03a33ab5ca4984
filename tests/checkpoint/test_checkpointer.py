"""When and how a run is saved: all ranks at one step, also where a disk is full or one rank alone is sent a signal."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch.distributed as dist

from amclr_scale.checkpoint import files, state
from amclr_scale.checkpoint.checkpointer import Checkpointer, _Writing
from amclr_scale.checkpoint.signals import Signals, StoppedError, UnsavedError
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.metrics.log import RunLog
from tests.checkpoint.trainer import CPU, ROOT, SAMPLES, SIZE, Trainer
from tests.commands.test_train import SMALL, train

SCORES = [0.3, 0.5, 0.4, 0.5, 0.2, 0.6]


def kept(folder, steps, act=lambda done, signals: None, max_hours=None, **settings):
    """On each rank: train and keep. Returns the checkpoints there are, the log's words, and how it ended."""
    rank, world = dist.get_rank(), dist.get_world_size()
    trainer = Trainer("sogclr", zero_stage=2)
    checkpoint = trainer.config.checkpoint.model_copy(update={"every_minutes": None, **settings})
    train = trainer.config.train.model_copy(update={"samples": steps * SIZE, "max_hours": max_hours})
    config = trainer.config.model_copy(update={"checkpoint": checkpoint, "train": train})
    plan = make_plan(config, SAMPLES, world)
    folder.mkdir(parents=True, exist_ok=True)
    words, end, reached = [], "", 0
    with RunLog(folder, config, speaks=rank == 0, total_steps=steps) as log, Signals() as signals:
        log.say, signals.saves = words.append, True
        saver = Checkpointer(
            folder, config, plan, engine=trainer.engine, objective=trainer.objective, fingerprint="f",
            tokenizer=load_tokenizer("emoji", 8), log=log, signals=signals, device=CPU,
        )  # fmt: skip
        try:
            with saver:
                for done in range(1, steps + 1):
                    trainer.train(done - 1, done)
                    reached = done
                    act(done, signals)
                    if checkpoint.best:
                        saver.scores.add(done, {checkpoint.best: SCORES[done - 1]})
                    saver.after_step(plan.position(done))
        except (StoppedError, UnsavedError) as error:
            end = f"{type(error).__name__}: {error}"
    dist.barrier()
    trainer.close()
    return files.steps(folder / "checkpoints"), words, end, reached


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saved_every_so_many_samples_and_at_the_end(ranks, tmp_path, asynchronous):
    how = {"every_samples": 2 * SIZE, "keep": 2, "keep_every": 1, "asynchronous": asynchronous}
    for steps, _, end, _ in ranks(2, kept, tmp_path, 5, **how):
        assert steps == [5, 4, 2]
        assert end == ""
    for step in (5, 4, 2):
        checkpoint = tmp_path / "checkpoints" / files.name_of(step)
        assert files.fault(checkpoint) is None
        assert files.read_state(checkpoint)["samples"] == step * SIZE
        saved = load_tokenizer(str(checkpoint / "tokenizer"), 8)
        assert saved.fingerprint() == files.read_state(checkpoint)["tokenizer_fingerprint"]
    records = (tmp_path / "metrics.jsonl").read_text()
    assert records.count("checkpoint/write_seconds") == 3


def test_the_checkpoint_that_scored_best_is_kept(ranks, tmp_path):
    for steps, _, end, _ in ranks(
        2, kept, tmp_path, 5, best="photos/image_to_text_R@1", keep=1, every_samples=3 * SIZE
    ):
        assert (steps, end) == ([5, 2], "")  # of 1 to 5: by score 1 and 2, by samples 3, the last one
    best = tmp_path / "checkpoints" / "best"
    assert best.read_text() == "step_00000002\n"
    assert files.locate(best, "key", "a run")[0] == tmp_path / "checkpoints" / files.name_of(2)
    files.set_aside_after(tmp_path / "checkpoints", 1)
    assert not best.exists()


def signal_to_rank_one(done, signals):
    if done == 3 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_to_one_rank_saves_on_all(ranks, tmp_path):
    for steps, _, end, reached in ranks(2, kept, tmp_path, 6, signal_to_rank_one):
        assert steps == [3]
        assert reached == 3
        assert end.startswith("StoppedError: ")
        assert "saved after step 3" in end
    assert files.fault(tmp_path / "checkpoints" / files.name_of(3)) is None


def test_a_time_limit_does_the_same(ranks, tmp_path):
    for steps, _, end, _ in ranks(2, kept, tmp_path, 6, max_hours=1e-9):
        assert steps == [1]
        assert "train.max_hours: 1e-09 hours are over; saved after step 1" in end


def slow_write(release, original):
    def write(self, folder):
        release.wait(20)
        return original(self, folder)

    return write


def training_goes_on_while_it_writes(folder):
    release, original = threading.Event(), state.Snapshot.write
    seen = []

    def act(done, _):
        seen.append((done, files.steps(folder / "checkpoints")))
        if done == 4:
            release.set()

    state.Snapshot.write = slow_write(release, original)
    try:
        return kept(folder, 6, act, every_minutes=1e-9, asynchronous=True), seen
    finally:
        state.Snapshot.write = original


def test_writing_does_not_hold_up_training(ranks, tmp_path):
    # By the clock a save is due at every step, and the first one is not let to the disk before step 4 is trained.
    (result, seen), _ = ranks(2, training_goes_on_while_it_writes, tmp_path)
    assert [steps for done, steps in seen if done <= 4] == [[]] * 4
    assert result[0][0] == 6


def busy(*_):
    raise OSError(39, "Directory not empty")  # NFS, while another process reads a file in it


def with_old_ones_in_use(folder):
    original, files.remove = files.remove, busy
    try:
        return kept(folder, 3, every_samples=SIZE, keep=1, on_failure="stop")
    finally:
        files.remove = original


def test_an_old_one_that_cannot_be_removed_does_not_end_the_run(ranks, tmp_path):
    (steps, words, end, reached), other = ranks(2, with_old_ones_in_use, tmp_path)
    assert (end, other[2], reached, steps[0]) == ("", "", 3, 3)
    assert sum("could not be removed ([Errno 39] Directory not empty)" in line for line in words) == 2
    assert files.fault(tmp_path / "checkpoints" / files.name_of(3)) is None


def full_disk(folder, steps, **settings):
    return kept(folder, steps, every_samples=SIZE, asynchronous=False, **settings)


@pytest.fixture
def small_disk(tmp_path):
    """A file system that one checkpoint fits in, and two do not."""
    tmp_path.joinpath("disk").mkdir()
    disk = tmp_path / "disk"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted: {mounted.stderr.decode().strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("error", [MemoryError(), OSError(), ValueError("what no library says it raises")])
def test_a_writer_that_fails_in_any_way_has_not_written(tmp_path, error):
    class Snapshot:
        bytes = 1

        def write(self, folder):
            raise error

    writing = _Writing(Snapshot(), tmp_path, 1, 0.0)
    writing.wait()
    assert writing.error
    assert not writing.files


FULL = [  # settings, steps to make, steps made, how it ends
    ({"on_failure": "stop"}, 4, 2, "UnsavedError: checkpoint: step 2 could not be written"),
    ({}, 6, 4, "in a row could not be written, so the run ends; make room and go on with resume=auto"),
    ({"max_failures": None}, 6, 6, "UnsavedError: checkpoint: the last step, 6, could not be saved"),
    ({"on_failure": "stop"}, 2, 2, "UnsavedError: checkpoint: the last step, 2, could not be saved"),
]


@pytest.mark.parametrize(("settings", "steps", "made", "how"), FULL)
def test_a_full_disk_loses_nothing_and_is_no_success(ranks, small_disk, settings, steps, made, how):
    for saved, words, end, reached in ranks(2, full_disk, small_disk / "run", steps, **settings):
        assert saved == [1]
        assert how in end
        assert reached == made
        told = [line for line in words if "training goes on" in line]
        assert len(told) == (made - 2 if "so the run ends" in end else made - 1 if "last step" in end else 0)
    checkpoints = small_disk / "run" / "checkpoints"
    assert files.fault(checkpoints / files.name_of(1)) is None
    assert not list(checkpoints.glob(".writing*"))


@pytest.mark.launch
@pytest.mark.parametrize(("launcher", "number"), [("python", 1), ("torchrun", 2)])
def test_a_run_whose_last_checkpoint_is_not_there_has_failed(small_disk, launcher, number):
    """Though its weights and numbers are: exit code 1, with words of one rank."""
    home = small_disk.parent
    (home / "a").mkdir()
    (home / "a" / "checkpoints").symlink_to(small_disk)
    words = [*SMALL, f"run.folder={home}", "run.name=a", "train.samples=64", "checkpoint.every_minutes=null"]
    done = train(*words, launcher=launcher)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("checkpoint: the last step, 2, could not be saved (the reason is above)") == 1
    assert "No space left on device" in done.stdout
    assert "died or hangs" not in done.stderr
    if number == 1:
        assert "Traceback" not in done.stderr  # torchrun has one of its own for a rank that fails
    assert {"weights.safetensors", "evaluation.json"} <= {path.name for path in (home / "a").iterdir()}


ASKED = """
import ctypes, os, signal, time
from amclr_scale.checkpoint import signals
signals.SAME = 0.3

def send(number):
    os.kill(os.getpid(), number)

def hang():  # as in a collective whose others never come: no Python handler is ever called here
    mutex, libc = ctypes.create_string_buffer(128), ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)

with signals.Signals() as asked:
"""


def asked(code):
    """Exit code and words of a process that does this while it listens to signals."""
    lines = "".join(f"    {line}\n" for line in code.splitlines())
    done = subprocess.run(
        [sys.executable, "-c", ASKED + lines], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    return done.returncode, done.stderr


@pytest.mark.launch
def test_one_request_is_remembered_and_a_second_one_ends_at_once():
    """What launchers hand on of a Ctrl-C is not a second one: it comes at once."""
    handed_on = (
        "asked.saves = True\nsend(signal.SIGINT)\nsend(signal.SIGTERM)\nsend(signal.SIGINT)\nprint(asked.received)\n"
    )
    code, said = asked(handed_on + "time.sleep(0.6)")
    assert code == 0
    assert said.strip() == (
        "SIGINT came: the run saves after the present step and ends; once more, and it ends at once, unsaved"
    )
    code, said = asked(handed_on + "time.sleep(0.4)\nsend(signal.SIGINT)\ntime.sleep(30)")
    assert code == 128 + signal.SIGINT
    assert "SIGINT came, again: the run ends at once" in said


@pytest.mark.launch
def test_requests_reach_a_rank_that_hangs_and_one_that_has_nothing_to_save():
    beside = (
        "parent = os.getpid()\nif not os.fork():\n"
        + "".join(f"    time.sleep({pause})\n    os.kill(parent, signal.SIGTERM)\n" for pause in (0.1, 0.4))
        + "    os._exit(0)\n"
    )
    assert asked(beside + "asked.saves = True\nhang()")[0] == 128 + signal.SIGTERM
    code, said = asked(beside + "hang()")
    assert code == 75
    assert "SIGTERM came: the run ends; nothing was trained since the last save, so nothing is lost" in said


@pytest.mark.launch
def test_what_a_child_is_sent_is_not_the_run_s():
    code, said = asked(
        "child = os.fork()\nif not child:\n    time.sleep(0.3)\n    os._exit(7)\nasked.saves = True\n"
        "time.sleep(0.1)\nos.kill(child, signal.SIGUSR1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7\nassert not asked.received"
    )
    assert (code, said) == (0, "")
