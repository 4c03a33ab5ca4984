"""Crops, flips and greys of many small pictures at once, on the device that holds them: Pillow's arithmetic, exactly.

Pillow resizes in two passes, along rows and then along columns, and each pass is a product with a matrix that depends
on the crop's two edges alone, in fixed point: coefficients are multiples of 2^-22, sums are rounded to 8 bits after
each pass. In float64 these sums are exact, so a picture is the same to the last bit on any device. For pictures of up
to 64 pixels a side all matrices fit into one table: 29 MB for 48 pixels to 32.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.augmentation.plans import Box, crop_box
from amclr_scale.data.randomness import Draws
from amclr_scale.data.resident.store import ResidentData
from amclr_scale.errors import UserError

LARGEST = 64  # pixels of a side
_AT_ONCE = 2048  # samples: 110 MB of float64 at 48 pixels
_BITS = 22
_SUPPORT = 2.0  # of the bicubic filter


def plan_crop(width: int, height: int, recipe: schema.ImageAugmentation, draws: Draws) -> list[int]:
    """(left, upper, right, lower, flip, grey) of one view; the draws are those of `augmented_view`."""
    box: Box = crop_box(width, height, recipe, draws)
    return [*box, draws.chance(recipe.flip), draws.chance(recipe.grayscale)]


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981, with a = -1/2."""
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < _SUPPORT, far, 0.0))


def resize_table(side: int, size: int) -> NDArray[np.float64]:
    """(side + 1, side + 1, size, side): integer coefficients from `side` pixels to `size`, by first and last edge."""
    table = np.zeros((side + 1, side + 1, size, side))
    place = np.arange(size, dtype=np.float64)
    pixel = np.arange(side, dtype=np.float64)
    for first in range(side):
        last = np.arange(first + 1, side + 1, dtype=np.float64)[:, None]  # (n, 1)
        scale = (last - first) / size
        filter_scale = np.maximum(scale, 1.0)
        support = _SUPPORT * filter_scale
        centre = first + (place + 0.5) * scale  # (n, size)
        low = np.maximum(np.trunc(centre - support + 0.5), 0)
        high = np.minimum(np.trunc(centre + support + 0.5), side)
        inside = (pixel >= low[..., None]) & (pixel < high[..., None])  # (n, size, side)
        weight = _bicubic((pixel - centre[..., None] + 0.5) * (1.0 / filter_scale)[..., None]) * inside
        weight /= np.cumsum(weight, -1)[..., -1:]  # summed in Pillow's order
        table[first, first + 1 :] = np.trunc(weight * 2**_BITS + np.where(weight < 0, -0.5, 0.5))
    return table


class ResidentPictures:
    """All pictures on one device.

    Raises:
        UserError: they are not all squares of one size, or too large.
    """

    def __init__(self, data: ResidentData, size: int, device: torch.device):
        sides = {(int(width), int(height)) for width, height in np.unique(data.sizes, axis=0)} - {(0, 0)}
        if len(sides) != 1 or not all(width == height <= LARGEST for width, height in sides):
            got = ", ".join(f"{width} x {height}" for width, height in sorted(sides)[:4])
            raise UserError(
                f"data.resident: device holds squares of one size, of at most {LARGEST} pixels a side; expected such, "
                f"got {got}{' and others' if len(sides) > 4 else ''}; use data.resident=host"
            )
        self.size, self.device = size, device
        self.side = next(iter(sides))[0]
        self._row = torch.from_numpy(np.cumsum(data.sizes[:, 0] > 0) - 1).to(device)  # a bad sample has no row
        rows = data.pixels.reshape(-1, self.side, self.side, 3)
        self._pictures = torch.empty(len(rows), 3, self.side, self.side, dtype=torch.uint8, device=device)
        for start in range(0, len(rows), 16 * _AT_ONCE):
            part = slice(start, start + 16 * _AT_ONCE)
            self._pictures[part] = torch.from_numpy(rows[part].copy()).to(device).permute(0, 3, 1, 2)
        self._tables: dict[int, Tensor] = {}

    def views(self, crops: tuple[Tensor, ...], *, from_base: bool) -> tuple[Tensor, ...]:
        """Every view of n samples, (n, 3, size, size) uint8 on the device.

        Args:
            crops: for each view (n, 7) int64, from `plan_crop`, and the id of the sample whose picture it is.
            from_base: whether further views are made of the first one.
        """
        found = list[Tensor]()
        for view, crop in enumerate(crops):
            planned, out = crop.to(self.device), list[Tensor]()
            for start in range(0, len(planned), _AT_ONCE):
                part = slice(start, start + _AT_ONCE)
                base = view and from_base
                source = found[0][part] if base else self._pictures[self._row[planned[part, 6]]]
                out.append(self._cropped(source, planned[part]))
            found.append(torch.cat(out) if len(out) > 1 else out[0])
        return tuple(found)

    def _cropped(self, source: Tensor, crop: Tensor) -> Tensor:
        n, _, side, _ = source.shape
        table = self._table(side)
        left, upper, right, lower, flip, grey, _ = crop.unbind(1)
        across, down = table[left, right], table[upper, lower]  # (n, size, side) each
        x = _rounded(source.double().reshape(n, 3 * side, side) @ across.transpose(1, 2))
        x = _rounded(down[:, None] @ x.view(n, 3, side, self.size))
        x = torch.where(flip.bool()[:, None, None, None], x.flip(3), x)
        red, green, blue = x.long().unbind(1)
        luma = ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16)[:, None].expand_as(x)
        return torch.where(grey.bool()[:, None, None, None], luma.double(), x).to(torch.uint8)

    def _table(self, side: int) -> Tensor:
        if side not in self._tables:
            self._tables[side] = torch.from_numpy(resize_table(side, self.size)).to(self.device)
        return self._tables[side]


def _rounded(sums: Tensor) -> Tensor:
    """From fixed point to 8 bits."""
    return torch.floor((sums + 2.0 ** (_BITS - 1)) * 2.0**-_BITS).clamp(0, 255)
