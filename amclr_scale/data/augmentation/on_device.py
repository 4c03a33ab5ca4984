"""A batch's views, made where the towers run, out of what workers have sent or of pictures that lie there."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from amclr_scale.data.augmentation.batched import apply_all
from amclr_scale.data.augmentation.cropping import check_arithmetic, cropped, to_device
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
        found = [self._views(group) for group in self._grouped(parts)]
        return tuple(torch.cat(view) if len(view) > 1 else view[0] for view in zip(*found, strict=True))

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

    def _views(self, parts: list[Sent]) -> list[Tensor]:
        sent = [pixels for _, pixels in parts if pixels is not None]
        samples = self._before([len(rows[0]) for rows, _ in parts])
        pixels = self._held if self._held is not None else self._sent(sent)
        before = self._before([len(each) for each in sent]) if self._held is None else [0] * len(parts)
        found = list[Tensor]()
        for view in range(len(parts[0][0])):
            of_base = view in self.of_base
            first = [at * self.size**2 for at in samples] if of_base else before
            rows = torch.cat([self._moved(part[view], at) for (part, _), at in zip(parts, first, strict=True)])
            source = found[0].permute(0, 2, 3, 1).reshape(-1, 3) if of_base else pixels
            made = cropped(source, rows[:, :COLUMNS], self.size)
            found.append(apply_all(made, rows[:, COLUMNS:].unflatten(1, (-1, 3))) if rows.shape[1] > COLUMNS else made)
        return found

    def _sent(self, pixels: list[Tensor]) -> Tensor:
        pinned = self.device.type == "cuda"
        joined = torch.empty(sum(map(len, pixels)), 3, dtype=torch.uint8, pin_memory=pinned)
        return torch.cat(pixels, out=joined).to(self.device, non_blocking=True)

    @staticmethod
    def _before(counts: list[int]) -> list[int]:
        """How many come before each."""
        return [sum(counts[:k]) for k in range(len(counts))]

    @staticmethod
    def _moved(rows: Tensor, by: int) -> Tensor:
        moved = rows.clone()
        moved[:, START] += by
        return moved
