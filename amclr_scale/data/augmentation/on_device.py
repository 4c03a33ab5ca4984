"""A batch's views, made where the towers run, out of what workers have sent or of pictures that lie there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from amclr_scale.data.augmentation import batched, cropping
from amclr_scale.data.augmentation.batched import apply_all
from amclr_scale.data.augmentation.cropping import START, check_arithmetic, cropped
from amclr_scale.data.augmentation.shipping import COLUMNS, MOST_SENT

AT_ONCE = 1 << 27  # bytes of sent pixels on the device at a time, or the few more of one part

Sent = tuple[tuple[Tensor, ...], Tensor | None]  # rows of every view, (n, COLUMNS + 3 steps); pixels, (P, 3) uint8


def held_for_a_moment(samples: int, size: int) -> int:
    """Bytes, at most, beside the views themselves and the pixels that they are made of, while they are made."""
    pixels = min(cropping.AT_ONCE, samples * MOST_SENT * size**2)
    values = min(batched.AT_ONCE, samples * 3 * size**2)
    one_view = samples * 3 * size**2  # before it is changed, or what it is cut out of
    return max(cropping.BYTES_EACH * pixels, batched.BYTES_EACH * values) + one_view


@dataclass(frozen=True)
class Staged:
    """A batch's rows and pixels on the host, ready to be copied.

    Attributes:
        rows: of every view, (n, COLUMNS + 3 steps).
        ends: after which rows the pixels of another group begin.
        pixels: of each group, (P, 3), in pinned memory where there is a GPU.
    """

    rows: tuple[Tensor, ...]
    ends: list[int]
    pixels: list[Tensor | None]


class DeviceViews:
    """`views(staged)` -> every view of a batch, (n, 3, size, size) uint8 on the device. The host does not wait for it.

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

    def stage(self, parts: Sequence[Sent]) -> Staged:
        """What the host has to do, in any thread: the parts as one."""
        pixels, ends, done = list[Tensor | None](), list[int](), 0
        moved = [list[Tensor]() for _ in parts[0][0]]
        for group in self._grouped(parts):
            sent = [each for _, each in group if each is not None]
            places = _before(list(map(len, sent))) if self._held is None else [0] * len(group)
            for (rows, _), place in zip(group, places, strict=True):
                for view, own in enumerate(rows):
                    moved[view].append(_moved(own, done * self.size**2 if view in self.of_base else place))
                done += len(rows[0])
            ends.append(done)
            pixels.append(self._pinned(sent) if self._held is None else None)
        return Staged(tuple(map(torch.cat, moved)), ends, pixels)

    def __call__(self, staged: Staged) -> tuple[Tensor, ...]:
        shape = 3, self.size, self.size
        own = [view for view in range(len(staged.rows)) if view not in self.of_base]
        cut = {view: torch.empty(staged.ends[-1], *shape, dtype=torch.uint8, device=self.device) for view in own}
        for first, end, sent in zip([0, *staged.ends], staged.ends, staged.pixels, strict=False):
            pixels = self._held if sent is None else sent.to(self.device, non_blocking=True)
            assert pixels is not None
            for view in own:
                cut[view][first:end] = cropped(pixels, staged.rows[view][first:end, :COLUMNS], self.size)
            del pixels
        made = list[Tensor]()
        for view, rows in enumerate(staged.rows):
            if view in self.of_base:
                base = made[0].permute(0, 2, 3, 1).reshape(-1, 3)
                cut[view] = cropped(base, rows[:, :COLUMNS], self.size)
                del base  # not held beside what follows
            made.append(apply_all(cut.pop(view), rows[:, COLUMNS:].unflatten(1, (-1, 3))))
        return tuple(made)

    def _grouped(self, parts: Sequence[Sent]) -> Iterator[list[Sent]]:
        group, size = list[Sent](), 0
        for part in parts:
            more = 0 if part[1] is None else part[1].numel()
            if group and size + more > AT_ONCE:
                yield group
                group, size = [], 0
            group.append(part)
            size += more
        yield group

    def _pinned(self, pixels: list[Tensor]) -> Tensor:
        pinned = self.device.type == "cuda"
        if len(pixels) == 1 and not pinned:
            return pixels[0]
        joined = torch.empty(sum(map(len, pixels)), 3, dtype=torch.uint8, pin_memory=pinned)
        return torch.cat(pixels, out=joined)


def _before(counts: list[int]) -> list[int]:
    """How many come before each."""
    return [0, *accumulate(counts)][: len(counts)]


def _moved(rows: Tensor, by: int) -> Tensor:
    """Rows whose pixels lie so many further on."""
    moved = rows.clone()
    moved[:, START] += by
    return moved
