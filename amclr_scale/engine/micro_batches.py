"""A batch in parts, each on its way to the device while the one before it is encoded.

A micro-batch holds images and texts of the same samples, or, when the towers have micro-batch sizes of their own,
those of one tower.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from amclr_scale.types import Batch

Views = tuple[Tensor, ...]


@dataclass(frozen=True)
class MicroBatch:
    """What is encoded at once: rows of the batch, where the loader left them, and how many tokens of its captions.

    Attributes:
        rows: in the order of encoding.
        images, texts: those rows of each view; where there is an `order`, of a side that is not `taken` yet, all of the
            batch.
        columns: tokens that are encoded; None: all.
        order: (b,) int64, the sample at each place of that order; None: as in the batch.
    """

    rows: slice
    images: Views
    texts: Views
    columns: int | None = None
    order: Tensor | None = None
    taken: tuple[str, ...] = ()

    def to(self, device: torch.device) -> "MicroBatch":
        """On the device; from pinned host memory the host does not wait for the copy."""
        sides = (self._rows("image", self.images), self._rows("text", self.texts))
        images, texts = ([view.to(device, non_blocking=True) for view in views] for views in sides)
        if self.columns is not None:  # cut there: a copy of part of pinned memory would be waited for
            texts = [view[:, : self.columns] for view in texts]
        return MicroBatch(self.rows, tuple(images), tuple(texts))

    def _rows(self, side: str, views: Views) -> Views:
        """The rows of some views, in pinned memory where the views are: taken when they are due, one copy at a time."""
        if self.order is None or side in self.taken:
            return views
        samples = self.order[self.rows]
        if views and views[0].device.type == "cuda":  # made there; a copy of other memory is waited for
            samples = samples.pin_memory().to(views[0].device, non_blocking=True)
        found = []
        for view in views:
            shape, pinned = (len(samples), *view.shape[1:]), view.is_pinned()
            out = torch.empty(shape, dtype=view.dtype, device=view.device, pin_memory=pinned)
            found.append(torch.index_select(view, 0, samples.to(view.device), out=out))
        return tuple(found)

    def with_features(self, features: Mapping[str, Tensor]) -> "MicroBatch":
        """With what frozen towers gave for all views, (b (1 + V), width) by side, instead of these."""
        views = {"image": self.images, "text": self.texts}
        found = {f"{side}s": rows.chunk(len(views[side])) for side, rows in features.items()}
        columns = None if "text" in features else self.columns
        return replace(self, **found, columns=columns, taken=(*self.taken, *features))  # type: ignore[arg-type]


def split(batch: Batch, image_size: int, text_size: int, order: Tensor | None = None) -> list[MicroBatch]:
    """Cut a batch into micro-batches (the last ones may be smaller).

    Args:
        order: (b,) int64, of encoding; None: as they are in the batch.
    """

    def cut(views: Views, rows: slice) -> Views:
        return views if order is not None else tuple(view[rows] for view in views)

    def rows(size: int) -> Iterator[slice]:
        return (slice(start, min(start + size, len(batch))) for start in range(0, len(batch), size))

    if image_size == text_size:
        return [MicroBatch(r, cut(batch.images, r), cut(batch.texts, r), order=order) for r in rows(image_size)]
    images = [MicroBatch(r, cut(batch.images, r), (), order=order) for r in rows(image_size)]
    return images + [MicroBatch(r, (), cut(batch.texts, r), order=order) for r in rows(text_size)]


def on_device(micro_batches: Sequence[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Each micro-batch on the device, the next one already on its way."""
    if not micro_batches:
        return
    copies = Copies(device)
    ahead = copies.send(micro_batches[0])
    for following in (*micro_batches[1:], None):
        copies.arrive()  # before the next one is sent, which nothing here has to wait for
        current, ahead = ahead, copies.send(following) if following is not None else ahead
        yield current


class Copies:
    """Copies to a device; on CUDA on a stream of their own, so that kernels that encode run beside them.

    A copy begins when everything asked of the device before it is done. So memory that an earlier micro-batch has
    given up, and that a copy is given, is read by nobody any more, and no more micro-batches are on the device than
    Python holds. (`Tensor.record_stream` would see to the first alone: a host that runs ahead of its device would
    fill it with copies.)
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = _stream_for_copies(device) if device.type == "cuda" else None

    def send(self, micro_batch: MicroBatch) -> MicroBatch:
        """Begin to copy; `arrive` before it is used."""
        if self.stream is None:
            return micro_batch.to(self.device)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            return micro_batch.to(self.device)

    def arrive(self) -> None:
        """What is asked of the device from here on finds everything that was sent."""
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


@cache
def _stream_for_copies(device: torch.device) -> torch.cuda.Stream:
    """One per device: memory that is freed on a stream serves later copies on that stream alone."""
    return torch.cuda.Stream(device)
