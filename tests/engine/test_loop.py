"""The training loop: nothing of a step is held while the next one runs, and hooks are told of each in order."""

import re
import time
import weakref
from itertools import repeat
from unittest import mock

import pytest
import torch

from amclr_scale.config import schema
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.engine.hooks import Hook
from amclr_scale.engine.loop import train
from amclr_scale.engine.records import FinalMeasurement, Measurement, TrainingRecords, faster_data
from amclr_scale.engine.step import StepReport
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Embeddings, Loss
from tests.engine.towers import config, global_batch

CPU = torch.device("cpu")
PLAN = Plan(100.0, 5, 4, 1, (4, 4))


class Step:
    """A step that leaves embeddings behind, and looks whether those of the step before are gone."""

    def __init__(self):
        self.objective, self.phases, self.rates = mock.MagicMock(), Phases(CPU), list[float]()
        self.seen: list[weakref.ref[torch.Tensor]] = []

    def __call__(self, batch, lr) -> StepReport:
        assert not any(alive() is not None for alive in self.seen), "a step's embeddings are alive in the next step"
        image = torch.ones(4, 2, requires_grad=True)
        image.sum().backward()
        self.seen.append(weakref.ref(image))
        self.rates.append(lr)
        return StepReport(Loss(torch.ones(()), {"objective": 1.0}), Embeddings(image, image), 1.0, 10.0)


def records(step: Step, log) -> TrainingRecords:
    rates = mock.MagicMock()
    rates.record.return_value = {}
    return TrainingRecords(
        config(4, run__log_every_steps=2), PLAN, log, objective=step.objective, phases=step.phases, throughput=rates,
        device=CPU,
    )  # fmt: skip


def test_embeddings_of_the_last_step_are_gone_when_the_next_one_begins():
    step, log = Step(), mock.MagicMock()
    train(step, repeat(global_batch(0, 4)), PLAN, [records(step, log)])
    assert len(step.seen) == 5
    assert log.step.call_count == 4  # of the first, the last, and every second step
    left = [call.args[2] for call in log.step.call_args_list]
    assert left[0] is None
    assert left[1] > left[2] > left[3] == 0  # seconds until the end
    assert [call.args[0] for call in step.objective.set_epoch.call_args_list] == [0, 0.04, 0.08, 0.12, 0.16]
    assert step.rates == [PLAN.position(n).lr for n in range(1, 6)]


def test_a_resumed_run_goes_on_with_the_number_of_its_step():
    """A teacher's course is at the share of the run that is done, and messages name the run's steps."""
    step = Step()
    train(step, repeat(global_batch(0, 4)), PLAN, [], begin=3)
    assert (step.steps, len(step.seen)) == (3, 2)  # this one does not count them itself
    assert [call.args[0] for call in step.objective.set_epoch.call_args_list] == [0.12, 0.16]
    assert step.rates == [PLAN.position(n).lr for n in (4, 5)]


def test_views_that_repeat_are_written_down_and_told_once():
    step, log = Step(), mock.MagicMock()
    training = records(step, log)
    training.repeated = lambda: {"repeated_images": 0.01, "repeated_texts": 0.4}
    train(step, repeat(global_batch(0, 4)), PLAN, [training])
    assert all(call.args[0]["repeated_texts"] == pytest.approx(0.4) for call in log.step.call_args_list)
    said = [call.args[0] for call in log.say.call_args_list if "repeat another view" in call.args[0]]
    assert said == ["data: 40% of further texts repeat another view of their sample; metrics.jsonl counts them"]


class Told(Hook):
    """Writes down what it is told."""

    def __init__(self, name, told, step):
        self.name, self.told, self.step = name, told, step

    def on_first_step(self):
        self.told.append((self.name, "first"))

    def on_step(self, done, batch, report):
        assert len(report.embeddings.image) == len(batch) == 4
        self.told.append((self.name, "step", done.step, done.samples, done.last))

    def after_step(self, done):
        assert self.step.seen[-1]() is None, "embeddings are alive while hooks measure and save"
        self.told.append((self.name, "after", done.step))

    def on_end(self):
        self.told.append((self.name, "end"))
        return {self.name: 1.0}


def test_hooks_are_told_in_their_order():
    step, told = Step(), []
    assert train(step, repeat(global_batch(0, 4)), PLAN, [Told("a", told, step), Told("b", told, step)], begin=3) == {
        "a": 1.0,
        "b": 1.0,
    }
    assert told == [
        ("a", "first"), ("b", "first"),
        ("a", "step", 4, 16, False), ("b", "step", 4, 16, False), ("a", "after", 4), ("b", "after", 4),
        ("a", "step", 5, 20, True), ("b", "step", 5, 20, True), ("a", "after", 5), ("b", "after", 5),
        ("a", "end"), ("b", "end"),
    ]  # fmt: skip


class End(Hook):
    def after_step(self, done):
        raise StopIteration


def test_a_hook_may_end_the_run():
    step, told = Step(), []
    with pytest.raises(StopIteration):
        train(step, repeat(global_batch(0, 4)), PLAN, [Told("a", told, step), End(), Told("b", told, step)])
    assert told[-1] == ("a", "after", 1)


@pytest.mark.parametrize(
    ("begin", "every", "steps"), [(0, None, [5]), (0, 8, [2, 4, 5]), (3, 8, [4, 5]), (0, 100 / 9, [3, 5])]
)
def test_when_something_is_measured(begin, every, steps):
    step, log, numbers = Step(), mock.MagicMock(), iter(range(10))
    training = records(step, log)
    measurement = FinalMeasurement("eval", lambda: {"x": float(next(numbers))}, PLAN, training, log, every=every)
    results = train(step, repeat(global_batch(0, 4)), PLAN, [training, measurement], begin=begin)
    written = [call.args[0] for call in log.write.call_args_list]
    assert [record["step"] for record in written] == steps
    assert [record["samples"] for record in written] == [4 * step for step in steps]
    assert results == {"x": written[-1]["eval/x"]} == {"x": len(steps) - 1}


def test_a_run_that_is_resumed_after_its_last_step_measures_again():
    step, log = Step(), mock.MagicMock()
    made = [kind("eval", lambda: {"x": 1.0}, PLAN, records(step, log), log, every=None)
            for kind in (Measurement, FinalMeasurement)]  # fmt: skip
    assert [train(step, iter(()), PLAN, [one], begin=5) for one in made] == [{}, {"x": 1.0}]
    (written,) = [call.args[0] for call in log.write.call_args_list]
    assert (written["step"], written["samples"], written["eval/x"]) == (5, 20, 1.0)


def test_the_last_measurement_comes_after_the_last_save():
    step, log, told = Step(), mock.MagicMock(), []
    last = FinalMeasurement("eval", lambda: told.append("measured") or {}, PLAN, records(step, log), log, every=4)
    train(step, repeat(global_batch(0, 4)), PLAN, [last, Told("saver", told, step)], begin=3)
    assert told[-3:] == [("saver", "after", 5), "measured", ("saver", "end")]
    assert told.count("measured") == 2


def test_the_time_of_a_measurement_is_not_the_training_s():
    step, log = Step(), mock.MagicMock()
    training = records(step, log)
    before = training._time
    training.phases._seconds["pass_1"] = 7.0
    Measurement("probe", dict, PLAN, training, log, every=4).after_step(PLAN.position(1))
    assert training._time > before
    assert training._samples == 4
    assert not training.phases.seconds()


def test_a_run_that_waits_for_data_is_told_what_to_turn():
    def slowly():
        while True:
            time.sleep(0.02)
            yield global_batch(0, 4)

    step, log = Step(), mock.MagicMock()
    train(step, slowly(), PLAN, [records(step, log)])
    [said] = [call.args[0] for call in log.say.call_args_list]
    assert re.fullmatch(r"data: \d+% of the time went into waiting for data; raise execution\.workers", said)
    gpu = torch.device("cuda")
    assert faster_data(schema.Data(), gpu).endswith(", or set data.augment_on=device")
    for keys in ({"augment_on": "device"}, {"resident": "device"}, {"features": {"image": "features.npy"}}):
        assert faster_data(schema.Data(**keys), gpu) == "raise execution.workers"
