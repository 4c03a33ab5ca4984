"""Operations that change levels and leave pixels where they are, on (m, 3, size, size) uint8: Pillow's arithmetic.

* Brightness, contrast and saturation are Pillow's blend: a + factor * (b - a) in float32, cut off, clamped. The factor
  is rounded to float32 first, as a C float is; multiplication and addition are calls of their own, for one that does
  both rounds once. (So would a Pillow whose compiler fused the two, which those for x86-64 do not.)
* Grey levels are (19595 R + 38470 G + 7471 B + 2**15) >> 16, ITU-R 601-2 in integers.
* Autocontrast is float64 arithmetic on 256 levels, equalisation is integers; posterisation and solarisation too.
* Hue goes through Pillow's 8-bit HSV. Its quotients are of two levels each, so they come from tables made on the host.
* Noise is a table of integers (`definitions`) at places that splitmix64 gives, in wrapping int64.
"""

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from amclr_scale.data.augmentation.definitions import NOISE_BITS, noise_table
from amclr_scale.data.augmentation.tables import Rows, by_level, looked_up, on_device, to_levels

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's, as in data/randomness.py
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)  # as int64 holds them


def blend(first: Tensor, second: Tensor, factors: Tensor) -> Tensor:
    """First + factors * (second - first), cut off to uint8; of float32 with integer values."""
    product = (second - first) * factors
    return to_levels(product.add_(first))


def luma(pictures: Tensor) -> Tensor:
    """(m, 1, size, size) int32."""
    red, green, blue = pictures.to(torch.int32).split(1, 1)
    found: Tensor = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return found


def _ramp(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.arange(256, device=device, dtype=dtype)


def grey(pictures: Tensor, _: Rows) -> Tensor:
    return luma(pictures).to(torch.uint8).expand_as(pictures)


def brightness(pictures: Tensor, rows: Rows) -> Tensor:
    """Blended with black."""
    ramp = _ramp(pictures.device, torch.float32)
    return by_level(pictures, blend(torch.zeros_like(ramp), ramp, rows.factors()[:, 0]))


def contrast(pictures: Tensor, rows: Rows) -> Tensor:
    """Blended with the mean of the grey picture, which is rounded, half up."""
    pixels = pictures.shape[-2] * pictures.shape[-1]
    total = luma(pictures).sum((1, 2, 3), dtype=torch.int64)
    mean = (2 * total + pixels).div(2 * pixels, rounding_mode="floor").to(torch.float32)
    ramp = _ramp(pictures.device, torch.float32)
    return by_level(pictures, blend(mean[:, None, None], ramp, rows.factors()[:, 0]))


def saturation(pictures: Tensor, rows: Rows) -> Tensor:
    """Blended with the grey picture."""
    return blend(luma(pictures).to(torch.float32), pictures.to(torch.float32), rows.factors())


def posterize(pictures: Tensor, rows: Rows) -> Tensor:
    """The upper bits stay."""
    return torch.bitwise_and(pictures, 256 - 2 ** (8 - int(rows.amount)))


def solarize(pictures: Tensor, rows: Rows) -> Tensor:
    """Inverted from the threshold on."""
    levels = pictures.to(torch.int16)  # to which a threshold of 256 is one
    return torch.where(levels < math.ceil(rows.amount), pictures, 255 - pictures)


def autocontrast(pictures: Tensor, _: Rows) -> Tensor:
    """Each channel's darkest level becomes 0, its brightest 255."""
    low, high = pictures.amin((2, 3))[..., None].double(), pictures.amax((2, 3))[..., None].double()
    scale = looked_up(_scales(pictures.device), (high - low).to(torch.int32))
    offset = -low * scale
    ramp = _ramp(pictures.device, torch.float64)
    return by_level(pictures, torch.where(high > low, to_levels((ramp * scale).add_(offset)), ramp.to(torch.uint8)))


@lru_cache(maxsize=16)
def _scales(device: torch.device) -> Tensor:
    """255 / n; a device may divide by multiplying with a reciprocal."""
    return on_device(255.0 / np.maximum(np.arange(256.0), 1), device)


def equalize(pictures: Tensor, _: Rows) -> Tensor:
    """Each channel's levels by how many pixels are below them."""
    m, pixels = len(pictures), pictures.shape[-2] * pictures.shape[-1]
    flat = pictures.reshape(3 * m, pixels).long()
    ones = torch.ones(1, dtype=torch.int64, device=flat.device).expand_as(flat)
    counts = torch.zeros(3 * m, 256, dtype=torch.int64, device=flat.device).scatter_add_(1, flat, ones)
    brightest = counts.gather(1, flat.amax(1, keepdim=True))
    step = (pixels - brightest).div(255, rounding_mode="floor")
    below = counts.cumsum(1) - counts + step.div(2, rounding_mode="floor")
    levels = below.div(step.clamp(min=1), rounding_mode="floor").clamp_(max=255)
    levels = torch.where(step > 0, levels, _ramp(flat.device, torch.int64))
    return levels.to(torch.uint8).gather(1, flat).view(pictures.shape)


@lru_cache(maxsize=16)
def _hsv_tables(device: torch.device) -> tuple[Tensor, ...]:
    """Hue, saturation, the lowest channel, the share of the middle one, and which channel is which; see `hue`."""
    level = np.arange(256)
    # To HSV. Of the two channels that are not the highest, one is the lowest, at a distance of the whole range.
    difference, spread = np.arange(-255, 256)[:, None], np.maximum(level, 1)
    first = (np.where(difference < 0, spread + difference, spread) / spread).astype(np.float32)
    second = (np.where(difference < 0, spread, spread - difference) / spread).astype(np.float32)
    from_red = (first - second).astype(np.float64)
    others = [np.float32(base + first.astype(np.float64) - second).astype(np.float64) for base in (2.0, 4.0)]
    turn = np.fmod(np.stack([from_red, *others]) / 6.0 + 1.0, 1.0).astype(np.float32)  # (3, 511, 256)
    hues = np.where(level > 0, (turn * 255.0).clip(0, 255), 0).astype(np.uint8)
    share = (level / np.maximum(level, 1)[:, None]).astype(np.float32)  # (highest, spread)
    saturations = (share.astype(np.float64) * 255.0).clip(0, 255).astype(np.uint8)
    # And back. In odd sectors the middle channel falls, in even ones it rises.
    sector = np.floor(level * 6.0 / 255.0)
    rest = (level * 6.0 / 255.0 - sector).astype(np.float32)[:, None]
    pure = (level / 255.0).astype(np.float32)
    falls, rises = 1.0 - (pure * rest).astype(np.float64), 1.0 - pure * (1.0 - rest.astype(np.float64))
    middle = np.where((sector % 2 == 1)[:, None], falls, rises)  # (hue, saturation)
    lowest = np.floor(level * (1.0 - pure.astype(np.float64))[:, None] + 0.5).astype(np.uint8)  # (saturation, highest)
    roles = np.array([[0, 1, 2], [1, 0, 2], [2, 0, 1], [2, 1, 0], [1, 2, 0], [0, 2, 1]])  # highest, middle, lowest
    channels = roles[sector.astype(int) % 6].T.astype(np.uint8)  # (channel, hue)
    return tuple(
        on_device(np.ascontiguousarray(table.reshape(-1)), device)
        for table in (hues, saturations, lowest, middle, *channels)
    )


def hue(pictures: Tensor, rows: Rows) -> Tensor:
    """The hue, one of 256, moved on; what HSV's eight bits cannot hold is lost, as in Pillow."""
    hues, saturations, lowest, middle, *channels = _hsv_tables(pictures.device)
    red, green, blue = pictures.to(torch.int32).unbind(1)
    highest = torch.maximum(torch.maximum(red, green), blue)
    spread = highest - torch.minimum(torch.minimum(red, green), blue)
    of_red, of_green = red == highest, green == highest  # red's sector where both are
    difference = torch.where(of_red, green - blue, torch.where(of_green, blue - red, red - green))
    sector = (~of_red).int() + (~(of_red | of_green)).int()
    turn = looked_up(hues, (sector * 511 + (difference + 255)) * 256 + spread).to(torch.int32)
    moved = (turn + (rows.amounts * 255).to(torch.int32)[:, None, None]) & 255
    saturation_ = looked_up(saturations, highest * 256 + spread).to(torch.int32)
    low = looked_up(lowest, saturation_ * 256 + highest)
    share = looked_up(middle, moved * 256 + saturation_)
    between = (share.mul_(highest.double())).add_(0.5).to(torch.uint8)  # rounded, half up
    top = highest.to(torch.uint8)
    roles = [looked_up(table, moved) for table in channels]
    return torch.stack([torch.where(role == 0, top, torch.where(role == 1, between, low)) for role in roles], 1)


def noise(pictures: Tensor, rows: Rows) -> Tensor:
    """Levels from the table are added; `definitions.noise_table` says at which bits."""
    m, _, height, width = pictures.shape
    values = height * width * 3
    words = rows.states[:, None] + _counters(-(-values // 4), pictures.device)
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        words = (words ^ _shifted(words, shift)) * multiplier
    words = words ^ _shifted(words, 31)
    mask = 2**NOISE_BITS - 1
    places = torch.stack([(words >> shift) & mask for shift in range(0, 64, NOISE_BITS)], -1).view(m, -1)
    added = looked_up(_noise_levels(rows.amount, pictures.device), places[:, :values])
    return to_levels(added.view(m, height, width, 3).permute(0, 3, 1, 2) + pictures)


def _shifted(words: Tensor, by: int) -> Tensor:
    """To the right, zeros shifted in."""
    return torch.bitwise_and(words >> by, 2 ** (64 - by) - 1)


@lru_cache(maxsize=16)
def _counters(words: int, device: torch.device) -> Tensor:
    return on_device((np.arange(1, words + 1, dtype=np.uint64) * np.uint64(_GOLDEN)).view(np.int64), device)


@lru_cache(maxsize=64)
def _noise_levels(deviation: float, device: torch.device) -> Tensor:
    return on_device(noise_table(deviation), device)
