"""A request to end is remembered, or ends the process at once; a second one ends it at once, an echo does nothing."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from unittest import mock

import pytest

from amclr_scale.checkpoint import signals
from amclr_scale.checkpoint.signals import ENDING, EXIT_RESUMABLE, SAME, Signals, StoppedError


class EndedError(BaseException):
    """In place of the end of the process, whose exit code it holds."""


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets; the end of the process is an exception."""
    now = [100.0]

    def end(code):
        raise EndedError(code)

    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "_exit", end)
    return now


def test_a_second_request_ends_at_once_but_an_echo_does_not(clock):
    asked = Signals(speaks=False)
    asked.saves = True
    asked.ask("SIGTERM came", signal.SIGTERM)
    assert asked.received == "SIGTERM came"
    clock[0] += SAME / 2
    asked.ask("SIGINT came", signal.SIGINT)  # launchers send both, or the same to a whole tree
    clock[0] += 10 * SAME
    asked.ask("the run was asked to end")  # by something else than a signal, which is never a second request
    assert asked.received == "SIGTERM came"
    with pytest.raises(EndedError) as ended:
        asked.ask("SIGINT came", signal.SIGINT)
    assert ended.value.args == (128 + signal.SIGINT,)
    assert asked.received == "SIGTERM came"  # why the run was asked to end


def test_once_the_state_is_saved_a_second_request_does_not_say_otherwise(clock):
    asked = Signals(speaks=False)
    asked.saves = True
    asked.ask("SIGINT came", signal.SIGINT)
    asked.saves = False
    clock[0] += SAME / 2
    asked.ask("SIGINT came", signal.SIGINT)  # the run is about to end by itself
    clock[0] += SAME
    with pytest.raises(EndedError) as ended:  # it hangs
        asked.ask("SIGINT came", signal.SIGINT)
    assert ended.value.args == (EXIT_RESUMABLE,)


LEAVES = """
import atexit, time
from amclr_scale.checkpoint.signals import EXIT_RESUMABLE, Signals

class Slow:  # a library's farewell, after Python's own
    def __del__(self):
        time.sleep(1)

slow = Slow()
atexit.register(lambda: (print("leaves", flush=True), time.sleep(0.3), print("left")))
with Signals(speaks=False) as signals:
    signals.saves = True
    print("began", flush=True)
    while not signals.received:
        time.sleep(0.01)
    signals.leave(EXIT_RESUMABLE)
"""


def test_a_run_that_leaves_keeps_its_exit_code_and_does_what_is_registered():
    with subprocess.Popen([sys.executable, "-c", LEAVES], stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "began\n"
        run.send_signal(signal.SIGINT)
        assert run.stdout.readline() == "leaves\n"
        while run.poll() is None:
            run.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert run.stdout.read() == "left\n"
    assert run.returncode == EXIT_RESUMABLE


def test_where_nothing_is_to_be_saved_the_first_ends_at_once(clock):
    asked = Signals(speaks=False)
    with pytest.raises(EndedError) as ended:
        asked.ask("SIGTERM came", signal.SIGTERM)
    assert ended.value.args == (EXIT_RESUMABLE,)
    clock[0] += 7200
    assert asked.hours() == 2


def leave_with(error, signals):
    """A block that an error leaves; while the hooks around it say farewell, the launcher's signal comes."""
    with ExitStack() as entered:
        entered.callback(signals.ask, "SIGTERM came", signal.SIGTERM)
        entered.push(signals.note_failure)
        raise error


@pytest.mark.parametrize("saves", [True, False])
def test_a_run_that_fails_says_nothing_of_saving_and_keeps_its_exit_code(saves, clock, capfd):
    """The launcher's signal, which follows the first rank that has ended, is no request."""
    failing = Signals()
    failing.saves = saves
    with pytest.raises(ValueError, match="own"):
        leave_with(ValueError("own error"), failing)
    assert capfd.readouterr().err == ""
    clock[0] += 2 * SAME
    with pytest.raises(EndedError) as ended:  # it hangs
        failing.ask("SIGTERM came", signal.SIGTERM)
    assert ended.value.args == (128 + signal.SIGTERM,)


def test_a_run_that_was_stopped_has_not_failed(clock):
    asked = Signals()
    asked.saves = True
    with pytest.raises(StoppedError):
        leave_with(StoppedError("saved"), asked)
    assert not asked.failed


def test_it_is_said_to_the_terminal_by_one_rank(clock, capfd):
    for speaks in (True, False):
        asked = Signals(speaks)
        asked.saves = True
        asked.ask("SIGTERM came", signal.SIGTERM)
        said = capfd.readouterr().err
        assert ("SIGTERM came: the run saves after the present step" in said) == speaks


def test_signals_are_noted_while_it_is_entered_and_not_in_forked_children():
    before = {number: signal.getsignal(number) for number in ENDING}
    with Signals(speaks=False) as asked:
        asked.saves = True
        child = os.fork()
        if not child:  # a data worker: nothing is noted for its parent, and it goes on
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        time.sleep(0.05)
        assert asked.received == ""
        with mock.patch.object(asked, "_take") as taken:
            asked._handle(signal.SIGTERM, None)
            taken.assert_called_once_with()
            with mock.patch.object(asked, "_owner", 0):  # in another process
                asked._handle(signal.SIGTERM, None)
            taken.assert_called_once_with()
        os.kill(os.getpid(), signal.SIGTERM)
        until = time.monotonic() + 10
        while not asked.received and time.monotonic() < until:
            time.sleep(0.001)
        assert asked.received == "SIGTERM came"
    assert {number: signal.getsignal(number) for number in ENDING} == before
