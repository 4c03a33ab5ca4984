"""Batches that are put together in a thread are the same ones, their errors are told in time, and it ends."""

import gc
import logging
import multiprocessing
import threading
import time

import pytest

from amclr_scale.data import loader
from amclr_scale.data.loader import TrainLoader
from amclr_scale.data.parts.ahead import Ahead
from amclr_scale.errors import UserError
from tests.data.shards import pair, settings, write_tar
from tests.data.test_loader import assert_same, take


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "batches"]


@pytest.fixture
def shards(tmp_path):
    """One sample of 24 has no picture."""
    members = [member for i in range(24) for member in (pair(i)[1:] if i == 5 else pair(i))]
    write_tar(tmp_path / "shards" / "0.tar", members)
    return str(tmp_path / "shards")


def batches_in_thread(data, count, **how):
    ahead = TrainLoader(data, seed=0, global_batch_size=8, workers=2, in_thread=True, **how)
    found = [next(ahead) for _ in range(count)]
    assert threads()
    ahead.close()
    assert not threads()
    return found, ahead


@pytest.mark.parametrize("place", ["workers", "device"])
def test_batches_and_what_is_told_of_them_are_the_same(shards, place, caplog):
    caplog.set_level(logging.WARNING, loader.__name__)
    data = settings(shards, max_bad_fraction=1.0, image_views=1)
    expected = take(data, 7)
    said = [record.getMessage() for record in caplog.records if record.name == loader.__name__]
    caplog.clear()
    found, ahead = batches_in_thread(data.model_copy(update={"augment_on": place}), 7)
    assert_same(found, expected)
    assert [record.getMessage() for record in caplog.records if record.name == loader.__name__] == said
    assert said
    assert ahead.counts == {"missing image": len(said)}
    later, _ = batches_in_thread(data, 4, start_step=3)
    assert_same(later, expected[3:])


def test_counts_are_of_batches_that_were_given(shards):
    """The one that is made ahead is not among them."""
    data = settings(shards, max_bad_fraction=1.0)
    plain = TrainLoader(data, seed=0, global_batch_size=8)
    found = TrainLoader(data, seed=0, global_batch_size=8, workers=1, in_thread=True)
    for _ in range(8):
        next(plain), next(found)
        assert found.counts == plain.counts
    plain.close(), found.close()


def test_an_error_comes_with_the_batch_that_it_belongs_to(shards, monkeypatch):
    data = settings(shards, max_bad_fraction=1.0)
    ahead = TrainLoader(data, seed=0, global_batch_size=8, workers=1, in_thread=True)
    made = ahead._next_part
    numbers = iter(range(10))

    def third_fails():
        if next(numbers) == 2:
            raise UserError("data.train: cannot be read")
        return made()

    monkeypatch.setattr(ahead, "_next_part", third_fails)
    next(ahead), next(ahead)
    for _ in range(2):  # also who asks again
        with pytest.raises(UserError, match=r"data\.train: cannot be read"):
            next(ahead)
    ahead.close()
    assert not threads()


def test_without_workers_there_is_no_thread(shards):
    plain = TrainLoader(settings(shards, max_bad_fraction=1.0), seed=0, global_batch_size=8, in_thread=True)
    next(plain)
    assert not threads()
    plain.close()


def test_a_loader_that_is_dropped_takes_its_thread_and_workers_with_it(shards):
    others = multiprocessing.active_children()  # of other tests
    dropped = TrainLoader(
        settings(shards, max_bad_fraction=1.0), seed=0, global_batch_size=8, workers=1, in_thread=True
    )
    next(dropped)
    thread, workers = dropped._ahead._thread, [one for one in multiprocessing.active_children() if one not in others]
    assert thread.is_alive()
    assert len(workers) == 1
    while not dropped._ahead._ready.full():  # the next one is made, and waits
        time.sleep(0.02)
    del dropped
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
    for worker in workers:
        worker.join(20)
        assert not worker.is_alive()


class Counting:
    def __init__(self):
        self.made, self.going = [], threading.Event()

    def make(self):
        self.made.append(len(self.made))
        self.going.set()
        return self.made[-1]


def test_one_is_made_while_one_waits_and_no_more():
    counting = Counting()
    made, ahead = counting.made, Ahead(counting, Counting.make)
    for number in range(5):
        counting.going.wait(5)
        counting.going.clear()
        threading.Event().wait(0.02)  # time for one too many
        assert made == list(range(number + 1))
        assert ahead.take() == number
    ahead.close()
    assert not ahead._thread.is_alive()
    assert len(made) <= 6
