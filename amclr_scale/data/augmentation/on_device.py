"""A batch's views, made where the towers run, out of what workers have sent or of pictures that lie there."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from amclr_scale.data.augmentation.batched import apply_all
from amclr_scale.data.augmentation.cropping import check_arithmetic, cropped
from amclr_scale.data.augmentation.shipping import COLUMNS, START

_AT_ONCE = 1 << 27  # bytes of sent pixels on the device at a time, or the few more of one part

Sent = tuple[tuple[Tensor, ...], Tensor | None]  # rows of every view, (n, COLUMNS + 3 steps); pixels, (P, 3) uint8


class DeviceViews:
    """`views(parts)` -> every view of a batch, (n, 3, size, size) uint8 on the device. The host waits for none of it.

    Args:
        size: pixels a side.
        device: where they are made.
        of_base: places of the views that are made of the first one.
        held: (P, 3) uint8 on the device, pixels of all pictures; None: each part brings its own.

    Raises:
        UserError: Pillow's arithmetic is another one.
    """

    def __init__(self, size: int, device: torch.device, of_base: range, held: Tensor | None = None):
        check_arithmetic()
        self.size, self.device, self.of_base, self._held = size, device, of_base, held

    def __call__(self, parts: Sequence[Sent]) -> tuple[Tensor, ...]:
        count = len(parts[0][0])
        own = [view for view in range(count) if view not in self.of_base]
        groups = [self._cropped(group, own) for group in self._grouped(parts)]
        cropped_views = dict(zip(own, map(_joined, zip(*groups, strict=True)), strict=True))
        made = list[Tensor]()
        for view in range(count):
            rows = _joined([images[view] for images, _ in parts])
            if view in self.of_base:  # whose pixels are those of the base views, changed
                before = _before([len(images[0]) * self.size**2 for images, _ in parts])
                rows = _joined([_moved(images[view], at) for (images, _), at in zip(parts, before, strict=True)])
                base = made[0].permute(0, 2, 3, 1).reshape(-1, 3)
                cropped_views[view] = cropped(base, rows[:, :COLUMNS], self.size)
            made.append(apply_all(cropped_views.pop(view), rows[:, COLUMNS:].unflatten(1, (-1, 3))))
        return tuple(made)

    def _grouped(self, parts: Sequence[Sent]) -> Iterator[list[Sent]]:
        group, size = list[Sent](), 0
        for part in parts:
            more = 0 if part[1] is None else part[1].numel()
            if group and size + more > _AT_ONCE:
                yield group
                group, size = [], 0
            group.append(part)
            size += more
        yield group

    def _cropped(self, parts: list[Sent], views: list[int]) -> list[Tensor]:
        """Those views of the samples of some parts, cropped and resized."""
        sent = [pixels for _, pixels in parts if pixels is not None]
        pixels = self._sent(sent) if self._held is None else self._held
        before = _before(list(map(len, sent))) if self._held is None else [0] * len(parts)
        rows = ([_moved(images[view], at) for (images, _), at in zip(parts, before, strict=True)] for view in views)
        return [cropped(pixels, _joined(each)[:, :COLUMNS], self.size) for each in rows]

    def _sent(self, pixels: list[Tensor]) -> Tensor:
        pinned = self.device.type == "cuda"
        joined = torch.empty(sum(map(len, pixels)), 3, dtype=torch.uint8, pin_memory=pinned)
        return torch.cat(pixels, out=joined).to(self.device, non_blocking=True)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


def _before(counts: list[int]) -> list[int]:
    """How many come before each."""
    return [0, *accumulate(counts)][: len(counts)]


def _moved(rows: Tensor, by: int) -> Tensor:
    """Rows whose pixels lie so many further on."""
    moved = rows.clone()
    moved[:, START] += by
    return moved
