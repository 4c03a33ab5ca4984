"""Operations that move pixels or mix neighbours, on (m, 3, size, size) uint8: Pillow's arithmetic.

* Shears, shifts and rotations take the nearest pixel. Which one that is, Pillow says itself: the same operation on a
  picture of pixel numbers gives the map, once per amount and size.
* Sharpness blends with a smoothed picture, whose weights 1 and 5 over 13 are integers; thirteenths never end in a half,
  so that Pillow's float32 sums round as integers do.
* Blur is integers by definition (`definitions`).
* The enlarged central crop is two products with a matrix of Pillow's coefficients (`cropping`), rounded to eight bits
  after each; in float64 these sums are exact in any order.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclr_scale.data.augmentation.colours import blend
from amclr_scale.data.augmentation.cropping import BITS, coefficients, cut_of
from amclr_scale.data.augmentation.definitions import BLUR_BITS, blur_weights, central_box
from amclr_scale.data.augmentation.pictures import apply
from amclr_scale.data.augmentation.plans import Operation
from amclr_scale.data.augmentation.tables import Rows, on_device, to_device, to_levels


def nearest(name: str) -> Callable[[Tensor, Rows], Tensor]:
    """The operation of that name, which takes the nearest pixel of another place, or black from outside."""

    def operation(pictures: Tensor, rows: Rows) -> Tensor:
        m, size = len(pictures), pictures.shape[-1]
        flat = torch.nn.functional.pad(pictures.view(3 * m, size * size), (1, 0))
        return flat.index_select(1, _map(name, rows.amount, size, pictures.device)).view(pictures.shape)

    return operation


@lru_cache(maxsize=64)
def _map(name: str, amount: float, size: int, device: torch.device) -> Tensor:
    """(size * size,) int64: where each pixel comes from, numbered from 1; 0 for black."""
    numbers = Image.fromarray(np.arange(1, size * size + 1, dtype=np.int32).reshape(size, size))  # like RGB, 32 bits
    return on_device(np.asarray(apply(numbers, [Operation(name, amount)])).astype(np.int64).reshape(-1), device)


def sharpness(pictures: Tensor, rows: Rows) -> Tensor:
    """Blended with the picture smoothed over 3 x 3 pixels, but for its edge."""
    whole = pictures.to(torch.float32)
    smooth = whole.clone()
    if pictures.shape[-1] > 2:
        x = pictures.to(torch.int16)
        sums = x[..., :-2] + x[..., 1:-1] + x[..., 2:]
        sums = sums[..., :-2, :] + sums[..., 1:-1, :] + sums[..., 2:, :] + 4 * x[..., 1:-1, 1:-1]
        smooth[..., 1:-1, 1:-1] = (sums + 6).div(13, rounding_mode="floor")
    return blend(smooth, whole, rows.factors())


def blur(pictures: Tensor, rows: Rows) -> Tensor:
    """A Gaussian on 3 x 3 pixels: `definitions.blur_weights`."""
    centre, edge, corner = blur_weights(rows.amount)
    x = pictures.to(torch.int32)
    across, down = _neighbours(x, 3), _neighbours(x, 2)
    sums = centre * x + edge * (across + down) + corner * _neighbours(across, 2)
    return torch.bitwise_right_shift(sums + 2 ** (BLUR_BITS - 1), BLUR_BITS).to(torch.uint8)


def _neighbours(x: Tensor, dim: int) -> Tensor:
    """The sum of the two pixels beside each, mirrored at the outermost ones."""
    length = x.shape[dim]
    if length == 1:
        return 2 * x
    before = torch.cat([x.narrow(dim, 1, 1), x.narrow(dim, 0, length - 1)], dim)
    after = torch.cat([x.narrow(dim, 1, length - 1), x.narrow(dim, length - 2, 1)], dim)
    return before + after


def central_crop_with_border(pictures: Tensor, rows: Rows) -> Tensor:
    """The central part, black around it."""
    left, upper, right, lower = central_box(pictures.shape[-1], rows.amount)
    out = torch.zeros_like(pictures)
    out[..., upper:lower, left:right] = pictures[..., upper:lower, left:right]
    return out


def central_crop(pictures: Tensor, rows: Rows) -> Tensor:
    """The central part, enlarged to the whole size; its edges see the pixels beyond them."""
    matrix = _enlargement(pictures.shape[-1], rows.amount, pictures.device)
    across = _rounded(pictures.double() @ matrix.T)
    return to_levels(_rounded(matrix @ across))


def _rounded(sums: Tensor) -> Tensor:
    """From fixed point to levels, half up."""
    half, unit = 2.0 ** (BITS - 1), 2.0**-BITS
    return sums.add_(half).mul_(unit).floor_().clamp_(0, 255)


@lru_cache(maxsize=64)
def _enlargement(side: int, stays: float, device: torch.device) -> Tensor:
    """(side, side) float64: bicubic weights of a central box's pixels, in units of 2**-22."""
    cut = cut_of(central_box(side, stays), side, side, side, (0, 0, side, side))
    return to_device(coefficients(cut, side), device)
