"""Training batches: the order of `data/order.py`, made by the pipeline, here or in worker processes.

The unit of work is a part of a batch, so that all workers decode one large batch together, and memory ahead of training
stays near one batch per rank. Parts come back in the order they were asked for, whoever made them.
"""

import atexit
import logging
import multiprocessing
import warnings
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from amclr_scale.config import schema
from amclr_scale.data.augmentation.on_device import DeviceViews, Staged
from amclr_scale.data.beside.communities import order_of_communities
from amclr_scale.data.beside.fingerprint import joined
from amclr_scale.data.captions.further_captions import check_further_captions, repeats
from amclr_scale.data.image_views import count_repeated
from amclr_scale.data.indexing import open_index
from amclr_scale.data.order import BatchOrder, Order
from amclr_scale.data.parts.ahead import Ahead
from amclr_scale.data.parts.joining import batch_of, join
from amclr_scale.data.parts.part import Fault, Part
from amclr_scale.data.parts.workers import Numbers, Parts, start_worker
from amclr_scale.data.pipeline import Pipeline
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


class _Made(NamedTuple):
    """A batch on the host, and what is to be told of it; its parts, in shared memory, are given back."""

    faults: list[Fault]
    repeated: Counter[str]
    joined: Batch | tuple[Batch, Staged]


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
        in_thread: whether workers' parts are joined in a thread, beside training; None: where there is a GPU.

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
        in_thread: bool | None = None,
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
        self._local, self._workers, self._in_thread = global_batch_size // world_size, workers, in_thread
        self._parts = Parts(self.order, pipeline, (global_batch_size, rank, world_size), _PART)
        self._prefetcher: Prefetcher | None = None
        self._device_views: DeviceViews | None = None
        self._ahead: Ahead[_Made] | None = None
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
            yield self._finished(
                self._joined([_good(self._parts[first + k]) for k in range(self._parts.parts_per_step)])
            )

    def __iter__(self) -> "TrainLoader":
        return self

    def __next__(self) -> Batch:
        if self._source is None:
            self._source = self._start()  # workers are forked before any thread is started
            if self._workers and (torch.cuda.is_initialized() if self._in_thread is None else self._in_thread):
                self._ahead = Ahead(self, TrainLoader._put_together)
        if self._prefetcher:
            self._prefetcher.advance(self._step)
        self._step += 1
        with _told_of_dead_workers():  # torch tells the main thread, wherever that is
            made = self._ahead.take() if self._ahead else self._put_together()
            self._count(made.faults)
            self._count_repeated(made.repeated)
            batch = self._finished(made.joined)
        if self._parts.pipeline.on_device and self.data.image_views:  # a number that lies there until it is asked for
            self._repeated_there = self._repeated_there + count_repeated(batch.images[: 1 + self.data.image_views])
        return batch

    def _put_together(self) -> "_Made":
        """The next batch, as far as the host makes it; perhaps in a thread."""
        parts = [self._next_part() for _ in range(self._parts.parts_per_step)]
        faults, repeated = [fault for part in parts for fault in part.faults], Counter[str]()
        for part in parts:
            repeated.update(part.repeated)
        return _Made(faults, repeated, self._joined(parts))

    def _hold(self) -> None:
        pipeline = self._parts.pipeline
        if self.data.resident != "none" and not (pipeline.resident or pipeline.tokens) and (note := pipeline.hold()):
            log.info(note)

    def _joined(self, parts: list[Part]) -> Batch | tuple[Batch, Staged]:
        """The parts as one; where the device makes views, without them, and what it makes them of."""
        if not self._parts.pipeline.on_device:
            views = zip(*(part.images for part in parts), strict=True)
            return batch_of(parts, tuple(join(list(view)) for view in views))
        return batch_of(parts, ()), self._views().stage([(part.images, part.pixels) for part in parts])

    def _finished(self, joined: Batch | tuple[Batch, Staged]) -> Batch:
        if isinstance(joined, Batch):
            return joined
        return replace(joined[0], images=self._views()(joined[1]))

    def _views(self) -> DeviceViews:
        """What makes views on this rank's device."""
        if self._device_views is None:
            data, held = self.data, self._parts.pipeline.resident
            device = torch.device("cuda" if torch.cuda.is_initialized() else "cpu")
            pixels = pixels_on(device, held, data.image_size) if held and data.resident == "device" else None
            self._device_views = DeviceViews(data.image_size, device, self._parts.pipeline.of_base, pixels)
        return self._device_views

    def close(self) -> None:
        """Stop the workers and close the shards."""
        if self._ahead:
            self._ahead.close()  # while workers still give it what it waits for
        # Not left to garbage collection: the traceback of an error in a worker holds on to what would be collected.
        getattr(self._source, "_shutdown_workers", bool)()
        self._source = self._device_views = self._ahead = None
        if self._prefetcher:
            self._prefetcher.close()
        self.index.close()
        if self.index.storage.stream:
            self.index.storage.stream.close()

    def _start(self) -> Iterator[Part | str]:
        numbers = Numbers(self.start_step * self._parts.parts_per_step)
        self._hold()  # before workers are forked, who share it
        if not self._workers:
            return (self._parts[number] for number in numbers)
        options: dict[str, Any] = {
            # Enough parts under way for one whole batch, or two for each worker.
            "prefetch_factor": max(2, -(-self._parts.parts_per_step // self._workers)),
            # A forked worker starts at once and shares what is open; it only ever reads.
            "multiprocessing_context": "fork" if "fork" in multiprocessing.get_all_start_methods() else None,
            "worker_init_fn": start_worker,
            # Its own: else starting the workers draws from the generator that dropout draws from.
            "generator": torch.Generator(),
        }
        with warnings.catch_warnings():  # how many workers a machine can feed is the user's choice
            warnings.filterwarnings("ignore", "This DataLoader will create")
            _with_workers.add(self)
            return iter(DataLoader(self._parts, batch_size=None, sampler=numbers, num_workers=self._workers, **options))

    def _next_part(self) -> Part:
        assert self._source is not None
        return _good(next(self._source))

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

    def _count_repeated(self, repeated: Counter[str]) -> None:
        """Count views that repeat another; stop where the texts do nothing else.

        Raises:
            UserError: all further texts of enough samples were repetitions.
        """
        self._repeated.update(repeated)
        of_texts = self._seen * self.data.text_views
        if self._seen >= self._patience and of_texts and self._repeated["repeated_texts"] == of_texts:
            raise UserError(repeats(self._seen, self._parts.pipeline.text.further))


@contextmanager
def _told_of_dead_workers() -> Iterator[None]:
    """Raises:
    UserError: in place of torch's error about a worker.
    """
    try:
        yield
    except (RuntimeError, EOFError, ConnectionError) as error:  # the latter where it died while it was sending
        words = str(error).strip() or type(error).__name__
        if words.startswith("Caught") or (
            isinstance(error, RuntimeError) and not words.startswith("DataLoader worker")
        ):
            raise
        raise UserError(
            f"execution.workers: a worker process died ({words}); it may have run out of memory: lower "
            "execution.workers, or give the machine more shared memory"
        ) from error


def _good(part: Part | str) -> Part:
    if isinstance(part, str):
        raise UserError(part)
    return part
