"""Crop and resize many pictures of any size at once, on the device that holds their pixels: Pillow's bytes, exactly.

Pillow resizes in two passes, along rows and then along columns, and each pass is a product with a matrix that depends
on the crop's two edges alone, in fixed point: coefficients are multiples of 2^-22, and sums are rounded to 8 bits after
each pass. Here the coefficients are made with Pillow's own operations in its own order, in float64, and each is cut
into two whole numbers, of which float32 adds up any products with 8-bit pixels without rounding: the sums are whole
numbers below 2^24. So a view is the same to the last bit whoever makes it. (Keys, "Cubic Convolution Interpolation for
Digital Image Processing", 1981, has the bicubic filter; here a = -1/2, and it is stretched when pictures are reduced.)
"""

import math
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
_BITS = 22
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
    with full_float32():
        for ones, turn in ((turned == 0, False), (turned != 0, True)):
            left = ones.nonzero()[:, 0]
            left = left[columns[left].argsort(stable=True)]
            left = left[rows[left].argsort(stable=True)]  # pictures of like shape together, which are padded least
            while len(left):
                padded = (one[left].cummax(0).values.clamp(min=size) for one in (rows, columns))
                count = math.prod(padded) * torch.arange(1, len(left) + 1)
                some = left[: max(1, int((count <= AT_ONCE).sum()))]
                views = _resized(pixels, cuts[some], size)
                found.index_copy_(0, to_device(some, pixels.device), views.transpose(2, 3) if turn else views)
                left = left[len(some) :]
    return found


def _resized(pixels: Tensor, cuts: Tensor, size: int) -> Tensor:
    rows, columns = (int(cuts[:, Cut._fields.index(name)].amax()) for name in ("rows", "columns"))
    taps = [_taps(cuts[:, a], cuts[:, b], size) for a, b in ((0, 2), (1, 3))]
    left, upper, right, lower, width, height, x, y, w, h, start, step, stride, _ = to_device(
        cuts, pixels.device
    ).unbind(1)
    across = _coefficients((left, right, width, x), size, columns, taps[0])
    down = _coefficients((upper, lower, height, y), size, rows, taps[1])
    row = torch.arange(rows, device=pixels.device).minimum(h[:, None] - 1) * stride[:, None] + start[:, None]
    column = torch.arange(columns, device=pixels.device).minimum(w[:, None] - 1) * step[:, None]
    places = row[:, :, None] + column[:, None]  # what lies beyond a window has coefficients of 0
    source = pixels.index_select(0, places.flatten()).view(*places.shape, 3).permute(0, 3, 1, 2)
    source = source.to(torch.float32, memory_format=torch.contiguous_format)  # (n, 3, rows, columns)
    lines = _rounded(source.flatten(1, 2) @ across.transpose(1, 2), 2)  # (n, 3 rows, size)
    lines = lines.view(len(cuts), 3, rows, size).transpose(1, 2).flatten(2)  # (n, rows, 3 size)
    return _rounded(down @ lines, 1).view(len(cuts), size, 3, size).transpose(1, 2).to(torch.uint8)


def _taps(first: Tensor, last: Tensor, size: int) -> int:
    """How many pixels one is made of at most."""
    scale = max(int((last - first).amax()) / size, 1.0)
    assert scale <= MOST_REDUCED
    return 2 * math.ceil(_SUPPORT * scale) + 1


def _coefficients(edges: tuple[Tensor, Tensor, Tensor, Tensor], size: int, pixels: int, taps: int) -> Tensor:
    """(n, 2 size, pixels) float32 whole numbers: of each coefficient the upper part, and below all of these the lower.

    Args:
        edges: each (n,): the crop's two edges, the pixels of the whole picture, and the window's first one.
        pixels: of the longest window.
        taps: how many of a row's are not 0, at most.
    """
    first, last, whole, start = (edge[:, None] for edge in edges)
    n, device = len(first), first.device
    scale = (last - first).double() / size
    stretch = scale.clamp(min=1.0)
    support = _SUPPORT * stretch
    centre = first + (torch.arange(size, dtype=torch.float64, device=device) + 0.5) * scale  # (n, size)
    low = (centre - support + 0.5).trunc().clamp(min=0)
    high = (centre + support + 0.5).trunc().minimum(whole)
    tap = torch.arange(taps, device=device)
    pixel = low[..., None] + tap  # (n, size, taps)
    inside = pixel < high[..., None]
    weight = _bicubic((pixel - centre[..., None] + 0.5) * (1.0 / stretch)[..., None]) * inside
    total = torch.zeros_like(centre)
    for k in range(taps):  # in Pillow's order, which decides the last bit
        total = total + weight[..., k]
    weight = weight / total[..., None]
    fixed = (weight * 2.0**_BITS + torch.where(weight < 0, -0.5, 0.5)).trunc()
    upper = torch.floor((fixed + 2.0 ** (_LOW_BITS - 1)) * 2.0**-_LOW_BITS)
    parts = torch.stack([upper, fixed - upper * 2.0**_LOW_BITS], 1).float().flatten(1, 2)  # (n, 2 size, taps)
    place = torch.where(inside, pixel.long() - start[..., None], pixels)  # what is not inside goes behind the last
    dense = torch.zeros(n, 2 * size, pixels + 1, device=device)
    return dense.scatter_(2, place.repeat(1, 2, 1), parts)[..., :pixels]


def _bicubic(x: Tensor) -> Tensor:
    a, x = -0.5, x.abs()
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return torch.where(x < 1, near, torch.where(x < _SUPPORT, far, 0.0))


def _rounded(sums: Tensor, dim: int) -> Tensor:
    """From sums of upper parts, and behind them of lower ones, to float32 of 8 bits."""
    upper, lower = sums.to(torch.int32).chunk(2, dim)
    fixed = (upper << _LOW_BITS) + lower + (1 << (_BITS - 1))
    return (fixed >> _BITS).clamp_(0, 255).float()
