"""Crop and resize many pictures of any size at once, on the device that holds their pixels: Pillow's bytes, exactly.

Pillow resizes in two passes, along rows and then along columns, and each pass is a product with a matrix that depends
on the crop's two edges alone, in fixed point: coefficients are multiples of 2^-22, and sums are rounded to 8 bits after
each pass. Here the coefficients are made with Pillow's own operations in its own order, in float64, and each is cut
into two whole numbers, of which float32 adds up any products with 8-bit pixels without rounding: the sums are whole
numbers below 2^24. So a view is the same to the last bit whoever makes it. (Keys, "Cubic Convolution Interpolation for
Digital Image Processing", 1981, has the bicubic filter; here a = -1/2, and it is stretched when pictures are reduced.)
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from PIL import __version__ as pillow_version
from torch import Tensor

from amclr_scale.data.augmentation.plans import Box
from amclr_scale.data.augmentation.tables import to_device
from amclr_scale.errors import UserError
from amclr_scale.precision import full_float32

MOST_REDUCED = 200  # how many times as long as a view's side that of a crop may be
BITS = 22  # of the fraction of coefficients
_LOW_BITS = 7  # of a coefficient's lower part: sums of 2^10 products of 2^6 with 2^8, and of 2^15 x 1.3 with 2^8
_SUPPORT = 2.0  # of the filter
AT_ONCE = 1 << 22  # pixels, with what smaller pictures are padded by
BYTES_EACH = 105  # of such a pixel, at the worst moment


class Cut(NamedTuple):
    """A view's crop, and where the pixels lie that it is made of. Of pictures that are `turned`, rows are columns."""

    left: int  # the crop, in the whole picture
    upper: int
    right: int
    lower: int
    width: int  # of the whole picture
    height: int
    x: int  # the window of pixels that the filter reads, in the whole picture
    y: int
    columns: int
    rows: int
    start: int  # the window's first pixel, and the way to the next one in its row and in its column, in pixels held
    step: int
    stride: int
    turned: bool


START = Cut._fields.index("start")


@cache
def _tall_ones_differ() -> bool:
    """Whether this Pillow makes the columns of tall pictures first, as it does since version 13."""
    tall = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 16), dtype=np.uint8))
    rows_first = tall.resize((8, 64), Image.Resampling.BICUBIC).resize((8, 8), Image.Resampling.BICUBIC)
    return rows_first.tobytes() != tall.resize((8, 8), Image.Resampling.BICUBIC).tobytes()


def _columns_first(width: int, height: int, size: int) -> bool:
    """Whether Pillow makes columns first, and then rows, of pictures of that size; each is rounded to 8 bits."""
    return height > size and height - size > 2 * (width - size) and _tall_ones_differ()


def check_arithmetic() -> None:
    """Make sure that the Pillow that is installed makes the same bytes.

    Raises:
        UserError: it does not; a later one may do otherwise what `cropped` does as those of today.
    """
    random, size = np.random.default_rng(0), 16
    for width, height in ((40, 30), (30, 40), (20, 90), (12, 12), (9, 33), (33, 9)):
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        box = (1, 2, width - 1, height - 3)
        cut = cut_of(box, width, height, size, (0, 0, width, height))
        found = cropped(torch.from_numpy(pixels).view(-1, 3), torch.tensor([cut]), size)[0].permute(1, 2, 0)
        expected = Image.fromarray(pixels).resize((size, size), Image.Resampling.BICUBIC, box)
        if found.numpy().tobytes() != expected.tobytes():
            raise UserError(
                f"data.augment_on: expected a Pillow whose resizing the device can repeat, got {pillow_version}; set "
                "data.augment_on=workers, and data.resident=host for device"
            )


def _reach(first: int, last: int, whole: int, size: int) -> tuple[int, int]:
    """Of `whole` pixels, the first and the end of those that `size` pixels between two edges are made of."""
    scale = (last - first) / size
    support = _SUPPORT * max(scale, 1.0)
    low = max(int(first + 0.5 * scale - support + 0.5), 0)
    return low, min(int(first + (size - 0.5) * scale + support + 0.5), whole)


def window_of(box: Box, width: int, height: int, size: int) -> Box:
    """What a view of size x size pixels needs of a picture of that size: the crop, and some pixels around it."""
    (left, right), (upper, lower) = _reach(box[0], box[2], width, size), _reach(box[1], box[3], height, size)
    return left, upper, right, lower


def cut_of(box: Box, width: int, height: int, size: int, held: Box, start: int = 0) -> Cut:
    """The cut of a crop of a picture of which one part is held.

    Args:
        held: that part of the picture; the crop's window lies inside it.
        start: pixels held before it.
    """
    left, upper, right, lower = window_of(box, width, height, size)
    stride = held[2] - held[0]
    first = start + (upper - held[1]) * stride + left - held[0]
    if _columns_first(width, height, size):
        turned = box[1], box[0], box[3], box[2], height, width, upper, left, lower - upper, right - left
        return Cut(*turned, first, stride, 1, True)
    return Cut(*box, width, height, left, upper, right - left, lower - upper, first, 1, stride, False)


def cropped(pixels: Tensor, cuts: Tensor, size: int) -> Tensor:
    """Views of size x size pixels: (n, 3, size, size) uint8, on the pixels' device, for which the host does not wait.

    Args:
        pixels: (P, 3) uint8, those of all pictures.
        cuts: (n, 14) int64 on the host, rows of `Cut`; no crop has sides of more than MOST_REDUCED x size.
    """
    found = torch.empty(len(cuts), 3, size, size, dtype=torch.uint8, device=pixels.device)
    columns, rows, turned = (cuts[:, Cut._fields.index(name)] for name in ("columns", "rows", "turned"))
    sides = (cuts[:, 2:4] - cuts[:, :2]).amax(1)  # of the crop, the longer one
    taps = (
        2 * torch.ceil(_SUPPORT * (sides.double() / size).clamp(min=1)).long() + 1
    )  # pixels that one is made of, at most
    with full_float32():
        for ones, turn in ((turned == 0, False), (turned != 0, True)):
            left = ones.nonzero()[:, 0]
            left = left[columns[left].argsort(stable=True)]
            left = left[rows[left].argsort(stable=True)]  # pictures of like shape together, which are padded least
            for some in _pieces(left, [2 * size * taps]):  # few of them, for every piece takes many small operations
                where, weights = to_device(some, pixels.device), _Weights(cuts[some], size, taps[some], pixels.device)
                shapes = rows[some].clamp(min=size), columns[some].clamp(min=size)
                for part in _pieces(torch.arange(len(some)), shapes):
                    own = slice(int(part[0]), int(part[-1]) + 1)
                    views = weights.applied(pixels, own)
                    found.index_copy_(0, where[own], views.transpose(2, 3) if turn else views)
    return found


def _pieces(rows: Tensor, factors: Sequence[Tensor]) -> Iterator[Tensor]:
    """Rows, as many at a time as take no more than AT_ONCE numbers; each takes the product of the largest factors."""
    while len(rows):
        each = math.prod(factor[rows].cummax(0).values for factor in factors)
        count = each * torch.arange(1, len(rows) + 1)
        some = rows[: max(1, int((count <= AT_ONCE).sum()))]
        yield some
        rows = rows[len(some) :]


class _Weights:
    """What Pillow weighs pixels with, for some cuts: coefficients along rows (0) and along columns (1).

    Args:
        taps: pixels that one of the view's is made of, at most, of each cut.
    """

    def __init__(self, cuts: Tensor, size: int, taps: Tensor, device: torch.device):
        assert int((cuts[:, 2:4] - cuts[:, :2]).amax()) <= MOST_REDUCED * size
        self.size, self.shapes = size, cuts[:, [Cut._fields.index("rows"), Cut._fields.index("columns")]]
        self._cuts = to_device(cuts, device)
        first, last, whole, start = (self._cuts[:, at : at + 2].T[..., None] for at in (0, 2, 4, 6))  # (2, n, 1) each
        scale = (last - first).double() / size
        stretch = scale.clamp(min=1.0)
        support = _SUPPORT * stretch
        centre = first + (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * scale  # (2, n, size)
        low = (centre - support + 0.5).trunc().clamp(min=0)
        high = (centre + support + 0.5).trunc().minimum(whole)
        most = int(taps.amax())
        pixel = low[..., None] + torch.arange(most, device=device)  # (2, n, size, taps)
        inside = pixel < high[..., None]
        weight = _bicubic((pixel - centre[..., None] + 0.5) * (1.0 / stretch)[..., None]) * inside
        total = torch.zeros_like(centre)
        for tap in weight.unbind(-1):  # in Pillow's order, which decides the last bit
            total = total + tap
        weight = weight / total[..., None]
        fixed = (weight * 2.0**BITS + torch.where(weight < 0, -0.5, 0.5)).trunc()
        upper = torch.floor((fixed + 2.0 ** (_LOW_BITS - 1)) * 2.0**-_LOW_BITS)
        # Whole numbers: of each coefficient the upper part, and behind all of these the lower; (2, n, 2 size, taps).
        self._parts = torch.stack([upper, fixed - upper * 2.0**_LOW_BITS], 2).float().flatten(2, 3)
        self._places = torch.where(inside, pixel.long() - start[..., None] + 1, 0)  # in the window, from 1

    def dense(self, axis: int, own: slice, pixels: int) -> Tensor:
        """(m, 2 size, pixels) float32, of a window's pixels."""
        places = self._places[axis, own].repeat(1, 2, 1)
        dense = torch.zeros(*places.shape[:2], pixels + 1, device=places.device)  # the first one takes what is outside
        return dense.scatter_(2, places, self._parts[axis, own])[..., 1:]

    def applied(self, pixels: Tensor, own: slice) -> Tensor:
        """The views of some of the cuts: (m, 3, size, size) uint8."""
        rows, columns = self.shapes[own].amax(0).tolist()
        across, down = self.dense(0, own, columns), self.dense(1, own, rows)
        w, h, start, step, stride = (self._cuts[own, at, None] for at in range(8, 13))
        row = torch.arange(rows, device=pixels.device).minimum(h - 1) * stride + start
        column = torch.arange(columns, device=pixels.device).minimum(w - 1) * step
        places = row[:, :, None] + column[:, None]  # what lies beyond a window has coefficients of 0
        source = pixels.index_select(0, places.flatten()).view(*places.shape, 3).permute(0, 3, 1, 2)
        source = source.to(torch.float32, memory_format=torch.contiguous_format)  # (m, 3, rows, columns)
        lines = _rounded(source.flatten(1, 2) @ across.transpose(1, 2), 2)  # (m, 3 rows, size)
        lines = lines.view(-1, 3, rows, self.size).transpose(1, 2).flatten(2)  # (m, rows, 3 size)
        return _rounded(down @ lines, 1).view(-1, self.size, 3, self.size).transpose(1, 2).to(torch.uint8)


def coefficients(cut: Cut, size: int) -> Tensor:
    """(size, width) float64 whole numbers, on the host: of the pixels in a row, for each of the view's."""
    rows = torch.tensor([cut])
    taps = 2 * math.ceil(_SUPPORT * max((cut.right - cut.left) / size, 1.0)) + 1
    weights = _Weights(rows, size, torch.tensor([taps]), rows.device)
    upper, lower = weights.dense(0, slice(0, 1), cut.columns)[0].double().chunk(2)
    found = torch.zeros(size, cut.width, dtype=torch.float64)
    found[:, cut.x : cut.x + cut.columns] = upper * 2.0**_LOW_BITS + lower
    return found


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < _SUPPORT, far, 0.0))


def _rounded(sums: Tensor, dim: int) -> Tensor:
    """From sums of upper parts, and behind them of lower ones, to float32 of 8 bits."""
    upper, lower = sums.to(torch.int32).chunk(2, dim)
    fixed = (upper << _LOW_BITS) + lower + (1 << (BITS - 1))
    return (fixed >> BITS).clamp_(0, 255).float()
