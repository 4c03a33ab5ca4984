"""When the checkpointer saves by the clock, and which failures end a run: on one rank, without an engine."""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from amclr_scale.checkpoint import checkpointer, files, state
from amclr_scale.checkpoint.checkpointer import Checkpointer
from amclr_scale.checkpoint.signals import StoppedError, UnsavedError
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.engine.batch_plan import Plan
from tests.checkpoint.test_files import configuration

PLAN = Plan(640.0, 10, 64, 1, (64, 64))


def saver(folder, signals=None, train=None, **settings):
    config = configuration(
        folder, checkpoint={"every_minutes": None, "asynchronous": False, **settings}, **(train or {})
    )
    signals = signals or SimpleNamespace(received="", hours=lambda: 0.0, saves=True)
    return Checkpointer(
        folder / "a", config, PLAN, engine=SimpleNamespace(global_rank=0), objective=mock.MagicMock(), fingerprint="f",
        tokenizer=load_tokenizer("emoji", 8), log=mock.MagicMock(), signals=signals, device=torch.device("cpu"),
    )  # fmt: skip


class Written:
    """A snapshot that writes one file, or fails."""

    bytes = 0

    def __init__(self, step: int, fails: bool):
        self.step, self.fails = step, fails

    def write(self, folder):
        if self.fails:
            raise OSError("no room")
        return [files.write_json(folder / files.STATE, {"step": self.step, "number": self.step})]


@pytest.fixture
def clock(monkeypatch):
    """Seconds, which a test moves on."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(checkpointer.time, "monotonic", lambda: now.seconds)
    return now


def disk(monkeypatch, failing):
    """What the snapshot of a step does; `failing` are the steps that the disk does not take."""
    monkeypatch.setattr(state, "take", lambda *given: Written(given[2]["step"], given[2]["step"] in failing))


def test_minutes_are_counted_from_the_last_save(clock, monkeypatch, tmp_path):
    disk(monkeypatch, ())
    one, saved = saver(tmp_path, every_minutes=2, keep=9), []
    for step in range(1, 11):
        clock.seconds += 50
        one.after_step(PLAN.position(step))
        saved.append(one.whole == step)
    assert [step for step, here in enumerate(saved, 1) if here] == [3, 6, 9, 10]  # after 150 s each, and the last


def test_hours_are_those_since_the_process_began(clock, monkeypatch, tmp_path):
    disk(monkeypatch, ())
    signals = SimpleNamespace(received="", hours=lambda: (clock.seconds - 1000) / 3600, saves=True)
    one = saver(tmp_path, signals, {"train": {"samples": 640, "global_batch_size": 64, "max_hours": 0.5}})
    for step in range(1, 6):
        clock.seconds += 420
        if step < 5:
            one.after_step(PLAN.position(step))
    with pytest.raises(StoppedError, match=r"train\.max_hours: 0\.5 hours are over; saved after step 5"):
        one.after_step(PLAN.position(5))


@pytest.mark.parametrize(("failing", "end"), [((2, 3, 5, 6, 8, 9), None), ((2, 3, 5, 6, 7), 7)])
def test_failures_in_a_row_end_a_run_and_others_do_not(monkeypatch, tmp_path, failing, end):
    disk(monkeypatch, failing)
    one, reached = saver(tmp_path, every_samples=64, max_failures=3, keep=9), 0
    with pytest.raises(UnsavedError, match="3 in a row could not be written") if end else nullcontext(), one:
        for reached in range(1, 11):
            one.after_step(PLAN.position(reached))
    assert reached == (end or 10)
    good = [step for step in range(1, reached + 1) if step not in failing]
    assert files.steps(one.folder) == good[::-1]
    assert one.whole == good[-1]
