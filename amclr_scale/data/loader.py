"""Training batches: the order of `data/order.py`, made by the pipeline, here or in worker processes.

The unit of work is a part of a batch, so that all workers decode one large batch together, and memory ahead of training
stays near one batch per rank. Parts come back in the order they were asked for, whoever made them.
"""

import atexit
import logging
import multiprocessing
import os
import signal
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from amclr_scale.config import schema
from amclr_scale.data.augmentation.on_device import DeviceViews
from amclr_scale.data.beside.communities import order_of_communities
from amclr_scale.data.beside.fingerprint import joined
from amclr_scale.data.captions.further_captions import check_further_captions, repeats
from amclr_scale.data.image_views import count_repeated
from amclr_scale.data.indexing import open_index
from amclr_scale.data.order import BatchOrder, Order, Visits
from amclr_scale.data.pipeline import Fault, Part, Pipeline
from amclr_scale.data.prefetch import Prefetcher
from amclr_scale.data.resident.pictures import pixels_on
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.distributed.launcher import ranks_on_node
from amclr_scale.errors import UserError
from amclr_scale.types import Batch

log = logging.getLogger(__name__)

_PART = 64  # samples; about 50 ms of work at 64 px and 0.3 s at 224 px
_LOGGED_FAULTS = 20  # per kind; all are counted
_FIRST = 1000  # max_bad_fraction is taken of at least so many samples, or one pass over a smaller data set


class _Parts(Dataset[Part | str]):
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


class _Numbers:
    """first, first + 1, ... without end."""

    def __init__(self, first: int):
        self.first = first

    def __iter__(self) -> Iterator[int]:
        number = self.first
        while True:
            yield number
            number += 1


def _start_worker(_: int) -> None:
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


_with_workers: weakref.WeakSet["TrainLoader"] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before Python's own end, which asks workers to end once and waits for ever."""
    for loader in list(_with_workers):
        loader.close()


class TrainLoader:
    """Batches of one rank, endless, from `start_step` on.

    Args:
        data: the recipe's section.
        seed: of the run.
        global_batch_size: B, a multiple of `data.lanes`.
        rank, world_size: whose share; `data.lanes` is a multiple of the ranks.
        workers: processes that read and decode; 0: this one. The batches do not depend on them.
        start_step: the position to resume at, in steps of this batch size.
        begun: as in `open_index`, where the position is only known later (`seek`).

    Attributes:
        num_samples: N.
        samples_per_epoch: N, but for a mixture with weights.
        fingerprint: of what is read (data/beside/fingerprint.py); a position means nothing under another one.
        features: of frozen towers, by the side whose pictures or captions they stand for.
        counts: unusable samples that this rank met, by kind.
        notes: what the log should say about the data.

    Raises:
        UserError: from the constructor and from iteration, when shards, captions or the tokenizer are not usable.
    """

    def __init__(
        self,
        data: schema.Data,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        start_step: int = 0,
        begun: bool = False,
    ):
        if data.lanes % world_size:
            raise UserError(f"data.lanes: expected a multiple of the {world_size} ranks, got {data.lanes}")
        if global_batch_size % data.lanes:
            raise UserError(
                f"train.global_batch_size: expected a multiple of data.lanes = {data.lanes}, got {global_batch_size}"
            )
        self.data, self.start_step, self._step = data, start_step, start_step
        self.index = open_index(data, share=(rank, world_size), begun=begun or start_step > 0)
        self.tokenizer = load_tokenizer(data.tokenizer, data.context_length)
        self.num_samples, self.fingerprint = self.index.num_samples, self.index.fingerprint
        self.order: BatchOrder
        if data.batches == "similar":
            self.order, digest = order_of_communities(data, self.index, seed)
            self.fingerprint = f"{self.fingerprint}-{digest[:8]}"
        else:
            parts = self.index.parts if data.weights else None  # without weights, several data sets are one
            self.order = Order(
                self.index.first_id, seed=seed, lanes=data.lanes, window=data.shuffle_window, parts=parts,
                weights=data.weights,
            )  # fmt: skip
            self.index.keep_open(data.lanes // world_size * data.shuffle_window)
        self.samples_per_epoch = self.order.samples_per_epoch
        self.counts, self._seen = Counter[str](), 0
        self._patience = min(_FIRST, self.num_samples // world_size)
        pipeline = Pipeline(self.index, data, seed, self.tokenizer)
        self.features, self.fingerprint = pipeline.features, joined(self.fingerprint, pipeline.digests())
        self.notes, self._repeated = list[str](), Counter[str]()
        self._repeated_there: Tensor | int = 0  # images, where the device makes them
        self._local, self._workers = global_batch_size // world_size, workers
        self._parts = _Parts(self.order, pipeline, (global_batch_size, rank, world_size), _PART)
        self._prefetcher: Prefetcher | None = None
        self._device_views: DeviceViews | None = None
        if not self.index.shards.remote.any():
            self.notes = check_further_captions(pipeline, data, seed)
        elif data.resident == "none" and isinstance(self.order, Order):  # another order reads no remote shards
            share = data.lanes // world_size
            own = range(rank * share, (rank + 1) * share)
            self._prefetcher = Prefetcher(
                self.index, self.order, own, global_batch_size // data.lanes, min(ranks_on_node(), world_size)
            )
        self._source: Iterator[Part | str] | None = None

    def seek(self, step: int) -> None:
        """Begin at another step than `start_step`. Only before the first batch."""
        assert self._source is None
        self.start_step = self._step = step

    def peek(self, samples: int) -> Iterator[Batch]:
        """This rank's share of the batches that come next, until all ranks together have so many samples.

        They are read in this process; nothing is counted, and the loader stays where it is.
        """
        self._hold()
        for step in range(self._step, self._step - (-samples // self._parts.batch[0])):
            first = step * self._parts.parts_per_step
            yield self._batch([_good(self._parts[first + k]) for k in range(self._parts.parts_per_step)])

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._source is None:
            self._source = self._start()  # workers are forked before any thread is started
        if self._prefetcher:
            self._prefetcher.advance(self._step)
        self._step += 1
        parts = [self._next_part() for _ in range(self._parts.parts_per_step)]
        self._count([fault for part in parts for fault in part.faults])
        self._count_repeated(parts)
        batch = self._batch(parts)
        if self._parts.pipeline.on_device and self.data.image_views:  # a number that lies there until it is asked for
            self._repeated_there = self._repeated_there + count_repeated(batch.images[: 1 + self.data.image_views])
        return batch

    def _hold(self) -> None:
        pipeline = self._parts.pipeline
        if self.data.resident != "none" and not (pipeline.resident or pipeline.tokens) and (note := pipeline.hold()):
            log.info(note)

    def _batch(self, parts: list[Part]) -> Batch:
        """The parts as one, their views made on this rank's device if that is where they are made."""
        pipeline, data = self._parts.pipeline, self.data
        if not pipeline.on_device:
            return _joined(
                parts, tuple(_join(list(view)) for view in zip(*(part.images for part in parts), strict=True))
            )
        if self._device_views is None:
            device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
            held = (
                pixels_on(device, pipeline.resident, data.image_size)
                if pipeline.resident and data.resident == "device"
                else None
            )
            self._device_views = DeviceViews(data.image_size, device, pipeline.of_base, held)
        return _joined(parts, self._device_views([(part.images, part.pixels) for part in parts]))

    def close(self) -> None:
        """Stop the workers and close the shards."""
        # Not left to garbage collection: the traceback of an error in a worker holds on to what would be collected.
        getattr(self._source, "_shutdown_workers", bool)()
        self._source = self._device_views = None
        if self._prefetcher:
            self._prefetcher.close()
        self.index.close()
        if self.index.storage.stream:
            self.index.storage.stream.close()

    def _start(self) -> Iterator[Part | str]:
        numbers = _Numbers(self.start_step * self._parts.parts_per_step)
        self._hold()  # before workers are forked, who share it
        if not self._workers:
            return (self._parts[number] for number in numbers)
        options: dict[str, Any] = {
            # Enough parts under way for one whole batch, or two for each worker.
            "prefetch_factor": max(2, -(-self._parts.parts_per_step // self._workers)),
            # A forked worker starts at once and shares what is open; it only ever reads.
            "multiprocessing_context": "fork" if "fork" in multiprocessing.get_all_start_methods() else None,
            "worker_init_fn": _start_worker,
            # Its own: else starting the workers draws from the generator that dropout draws from.
            "generator": torch.Generator(),
        }
        with warnings.catch_warnings():  # how many workers a machine can feed is the user's choice
            warnings.filterwarnings("ignore", "This DataLoader will create")
            _with_workers.add(self)
            return iter(DataLoader(self._parts, batch_size=None, sampler=numbers, num_workers=self._workers, **options))

    def _next_part(self) -> Part:
        assert self._source is not None
        try:
            part = next(self._source)
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(
                f"execution.workers: a worker process died ({error}); it may have run out of memory: lower "
                "execution.workers, or give the machine more shared memory"
            ) from error
        return _good(part)

    def _count(self, faults: list[Fault]) -> None:
        """Count and log unusable samples; stop when there are too many.

        Raises:
            UserError: more than `data.max_bad_fraction` of what this rank has seen.
        """
        self._seen += self._local
        for fault in faults:
            self.counts[fault.kind] += 1
            if self.counts[fault.kind] <= _LOGGED_FAULTS:
                last = "; further ones are only counted" if self.counts[fault.kind] == _LOGGED_FAULTS else ""
                log.warning("%s: sample %s (id %d): %s%s", fault.shard, fault.key, fault.sample, fault.words, last)
        bad = self.counts.total()
        if faults and bad > self.data.max_bad_fraction * max(self._seen, self._patience):
            kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.counts.most_common())
            raise UserError(
                f"data.max_bad_fraction: {bad:,} of {self._seen:,} samples cannot be used ({kinds}), more than "
                f"{self.data.max_bad_fraction:.2%}; the last is {faults[-1].key} of {faults[-1].shard}; mend the "
                "shards or raise data.max_bad_fraction"
            )

    def repeated(self) -> dict[str, float]:
        """Share of further views so far that equal an earlier view of their sample, of modalities that have any.

        Of hard negatives, the share that could not be made.
        """
        each = {"repeated_images": self.data.image_views, "repeated_texts": self.data.text_views}
        each |= {"missing_negatives": self.data.text_negatives, "missing_image_negatives": self.data.image_negatives}
        found = self._repeated + Counter(repeated_images=int(self._repeated_there))
        return {name: found[name] / max(1, self._seen * n) for name, n in each.items() if n}

    def _count_repeated(self, parts: list[Part]) -> None:
        """Count views that repeat another; stop where the texts do nothing else.

        Raises:
            UserError: all further texts of enough samples were repetitions.
        """
        for part in parts:
            self._repeated.update(part.repeated)
        of_texts = self._seen * self.data.text_views
        if self._seen >= self._patience and of_texts and self._repeated["repeated_texts"] == of_texts:
            raise UserError(repeats(self._seen, self._parts.pipeline.text.further))


def _good(part: Part | str) -> Part:
    if isinstance(part, str):
        raise UserError(part)
    return part


def _joined(parts: list[Part], images: tuple[Tensor, ...]) -> Batch:
    text_ids = [part.text_ids for part in parts if part.text_ids is not None]
    return Batch(
        ids=_join([part.ids for part in parts]),
        text_ids=_join(text_ids) if text_ids else None,
        given={name: _join([part.given[name] for part in parts]) for name in parts[0].given},
        images=images,
        texts=tuple(_join(list(view)) for view in zip(*(part.texts for part in parts), strict=True)),
    )


def _join(parts: list[Tensor]) -> Tensor:
    """One tensor, in pinned memory where this process has a GPU to copy it to.

    Asked of the process, not of the machine: pinning before it has chosen a GPU would open a context on the first one.
    """
    pinned = torch.cuda.is_initialized()
    if len(parts) == 1 and not pinned:
        return parts[0]
    shape = (sum(len(part) for part in parts), *parts[0].shape[1:])
    return torch.cat(parts, out=torch.empty(shape, dtype=parts[0].dtype, pin_memory=pinned))
