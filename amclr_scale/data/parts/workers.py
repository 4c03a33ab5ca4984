"""What runs in worker processes: parts by their number, and how such a process behaves."""

import os
import signal
from collections.abc import Iterator
from types import FrameType

import numpy as np
import torch
from torch.utils.data import Dataset

from amclr_scale.data.order import BatchOrder, Visits
from amclr_scale.data.parts.part import Part
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.errors import UserError


class Parts(Dataset[Part | str]):
    """Part number k of the rank's endless sequence.

    A user's mistake comes back as its words, not as an exception: torch would wrap it in the worker's traceback.
    """

    def __init__(self, order: BatchOrder, pipeline: Pipeline, batch: tuple[int, int, int], part: int):
        self.order, self.pipeline, self.batch, self.part = order, pipeline, batch, part
        self.local = batch[0] // batch[2]
        self.parts_per_step = -(-self.local // part)
        self._step, self._visits = -1, Visits(np.zeros(0, np.int64), np.zeros(0, np.int64))

    def __getitem__(self, number: int) -> Part | str:
        step, k = divmod(number, self.parts_per_step)
        try:
            if step != self._step:
                global_size, rank, world_size = self.batch
                self._step, self._visits = step, self.order.batch(step, global_size, rank, world_size)
            rows = slice(k * self.part, (k + 1) * self.part)
            return self.pipeline(Visits(self._visits.ids[rows], self._visits.passes[rows]))
        except UserError as error:
            return str(error)


class Numbers:
    """first, first + 1, ... without end."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        number = self.first
        while True:
            yield number
            number += 1


def start_worker(_: int) -> None:
    """One thread, and no death of signals that mean the rank: it comes to the end of its step, and ends its workers.

    Terminals, schedulers and DeepSpeed's launcher signal whole process trees. The second SIGTERM is the parent's own,
    to a worker that did not end when it was told so.
    """
    torch.set_num_threads(1)
    asked: list[int] = []

    def second_time(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if len(asked) > 1:
            os._exit(128 + number)

    signal.signal(signal.SIGTERM, second_time)
    for number in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
