"""Single image operations with random strengths, on 8-bit RGB pictures of any size, which they keep.

* RandAugment: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
  NeurIPS 2020, arXiv:1909.13719; operations and ranges as in torchvision.
* Colour jitter: brightness, contrast, saturation and hue in random order, as in torchvision.
* AmCLR's eight operations. The released code draws one for a whole batch, after normalisation, where its clamps to
  [0, 1] wipe out every pixel darker than the mean, and two of its crops change the size or shift the picture. Here one
  is drawn per sample, before normalisation; crops are centred and keep the size.

Eight bits are the precision of every operation: results are rounded and clamped to 0 .. 255.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from amclr_scale.data.randomness import Draws, random_words
from amclr_scale.torchvision_ops import import_torchvision

Picture = Image.Image


@cache
def _ops() -> Any:
    """torchvision.transforms.v2.functional; a second's import, so only where an operation of it is drawn."""
    import_torchvision()
    from torchvision.transforms.v2 import functional

    return functional


def color_jitter(picture: Picture, strength: float, draws: Draws) -> Picture:
    """Brightness, contrast, saturation within 1 +- strength, hue within a quarter of it, in random order."""
    ops = _ops()
    steps: list[tuple[Callable[[Picture, float], Picture], float]] = [
        (adjust, draws.uniform(max(0.0, 1 - strength), 1 + strength))
        for adjust in (ops.adjust_brightness, ops.adjust_contrast, ops.adjust_saturation)
    ]
    steps.append((ops.adjust_hue, draws.uniform(-min(0.5, strength / 4), min(0.5, strength / 4))))
    while steps:
        adjust, factor = steps.pop(draws.below(len(steps)))
        picture = adjust(picture, factor)
    return picture


def _shear(picture: Picture, x: float, y: float) -> Any:
    """Shear about the upper left corner, by the slope."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _ops().affine(picture, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _translate(picture: Picture, x: float, y: float) -> Any:
    """Shift by a share of the side."""
    pixels = [int(x * picture.width), int(y * picture.height)]
    return _ops().affine(picture, angle=0.0, translate=pixels, scale=1.0, shear=[0.0, 0.0])


# name: (size of the effect at magnitude 30, whether its sign is drawn, the operation)
_RANDAUGMENT: dict[str, tuple[float, bool, Callable[[Picture, float], Any]]] = {
    "identity": (0.0, False, lambda picture, _: picture),
    "shear_x": (0.3, True, lambda picture, size: _shear(picture, size, 0.0)),
    "shear_y": (0.3, True, lambda picture, size: _shear(picture, 0.0, size)),
    "translate_x": (150 / 331, True, lambda picture, size: _translate(picture, size, 0.0)),
    "translate_y": (150 / 331, True, lambda picture, size: _translate(picture, 0.0, size)),
    "rotate": (30.0, True, lambda picture, size: _ops().rotate(picture, size)),
    "brightness": (0.9, True, lambda picture, size: _ops().adjust_brightness(picture, 1 + size)),
    "color": (0.9, True, lambda picture, size: _ops().adjust_saturation(picture, 1 + size)),
    "contrast": (0.9, True, lambda picture, size: _ops().adjust_contrast(picture, 1 + size)),
    "sharpness": (0.9, True, lambda picture, size: _ops().adjust_sharpness(picture, 1 + size)),
    "posterize": (4.0, False, lambda picture, size: _ops().posterize(picture, 8 - round(size))),
    "solarize": (255.0, False, lambda picture, size: _ops().solarize(picture, 255 - size)),
    "autocontrast": (0.0, False, lambda picture, _: _ops().autocontrast(picture)),
    "equalize": (0.0, False, lambda picture, _: _ops().equalize(picture)),
}


def randaugment(picture: Picture, operations: int, magnitude: int, draws: Draws) -> Picture:
    """That many operations, drawn with replacement, all at one magnitude (0 .. 30)."""
    names = list(_RANDAUGMENT)
    for _ in range(operations):
        largest, signed, operation = _RANDAUGMENT[names[draws.below(len(names))]]
        size = largest * magnitude / 30
        picture = operation(picture, -size if signed and draws.chance(0.5) else size)
    return picture


def _noise(picture: Picture, deviation: float, draws: Draws) -> Picture:
    """Add Gaussian noise of that standard deviation (in units of the full range) to every channel."""
    shape = (picture.height, picture.width, 3)
    words = random_words(math.prod(shape), draws.bits()).reshape(shape)
    first = ((words >> np.uint64(32)).astype(np.float64) + 0.5) * 2.0**-32
    second = (words & np.uint64(0xFFFFFFFF)).astype(np.float64) * 2.0**-32
    normal = np.sqrt(-2 * np.log(first)) * np.cos(2 * np.pi * second)  # Box and Muller
    noisy = np.asarray(picture, dtype=np.float64) + 255 * deviation * normal
    return Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))


def _central(picture: Picture, share: float, border: bool) -> Picture:
    """The central part with that share of each side, enlarged again or with a black border."""
    width, height = max(1, round(picture.width * share)), max(1, round(picture.height * share))
    left, upper = (picture.width - width) // 2, (picture.height - height) // 2
    box = (left, upper, left + width, upper + height)
    if not border:
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box)
    canvas = Image.new("RGB", picture.size)
    canvas.paste(picture.crop(box), (left, upper))
    return canvas


def _flip(picture: Picture, draws: Draws) -> Picture:
    """Left-right, upside down, both, or neither."""
    if draws.chance(0.5):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draws.chance(0.5):
        picture = picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    return picture


_AMCLR: dict[str, Callable[[Picture, float, Draws], Any]] = {
    "blur": lambda p, s, _: _ops().gaussian_blur(p, [3, 3], [0.8 * s, 0.8 * s]),
    "flip": lambda p, _, draws: _flip(p, draws),
    "noise": lambda p, s, draws: _noise(p, 0.05 * s, draws),
    "brightness": lambda p, s, draws: _ops().adjust_brightness(p, max(0.0, draws.uniform(1 - 0.2 * s, 1 + 0.2 * s))),
    "contrast": lambda p, s, draws: _ops().adjust_contrast(p, max(0.0, draws.uniform(1 - 0.2 * s, 1 + 0.2 * s))),
    "sharpness": lambda p, s, _: _ops().adjust_sharpness(p, 1 + s),
    "central crop": lambda p, s, _: _central(p, max(0.1, 1 - 0.1 * s), border=False),
    "central crop with a border": lambda p, s, _: _central(p, max(0.1, 1 - 0.1 * s), border=True),
}


def amclr_operation(picture: Picture, strength: float, draws: Draws) -> Picture:
    """One of the eight operations."""
    operation = _AMCLR[list(_AMCLR)[draws.below(len(_AMCLR))]]
    changed: Picture = operation(picture, strength, draws)
    return changed
