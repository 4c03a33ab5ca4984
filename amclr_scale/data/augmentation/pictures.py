"""Plans carried out by Pillow, one 8-bit RGB picture at a time, of any size, which it keeps.

The operations are torchvision's (transforms v2, on PIL images), but for blur, noise and central crops, whose
definitions are ours. Eight bits are the precision of every operation: results are rounded and clamped to 0 .. 255.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from amclr_scale.data.augmentation.definitions import BLUR_BITS, blur_weights, central_box, noise_table
from amclr_scale.data.augmentation.plans import Operation
from amclr_scale.data.randomness import random_words
from amclr_scale.torchvision_ops import import_torchvision

Picture = Image.Image


@cache
def _ops() -> Any:
    """torchvision.transforms.v2.functional; a second's import, so only where an operation of it is drawn."""
    import_torchvision()
    from torchvision.transforms.v2 import functional

    return functional


def _shear(picture: Picture, x: float, y: float) -> Any:
    """Shear about the upper left corner, by the slope."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return _ops().affine(picture, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _translate(picture: Picture, x: float, y: float) -> Any:
    return _ops().affine(picture, angle=0.0, translate=[int(x), int(y)], scale=1.0, shear=[0.0, 0.0])


def _blur(picture: Picture, deviation: float) -> Picture:
    centre, edge, corner = blur_weights(deviation)
    x = np.asarray(picture).astype(np.int32)
    across, down = _neighbours(x, 1), _neighbours(x, 0)
    sums = centre * x + edge * (across + down) + corner * _neighbours(across, 0)
    return Image.fromarray(((sums + 2 ** (BLUR_BITS - 1)) >> BLUR_BITS).astype(np.uint8))


def _neighbours(x: NDArray[np.int32], axis: int) -> NDArray[np.int32]:
    """The sum of the two pixels beside each, mirrored at the outermost ones."""
    places, last = np.arange(x.shape[axis]), x.shape[axis] - 1
    before, after = np.abs(places - 1), last - np.abs(last - places - 1)
    total: NDArray[np.int32] = x.take(np.minimum(before, last), axis) + x.take(np.maximum(after, 0), axis)
    return total


def _noise(picture: Picture, deviation: float, seed: int) -> Picture:
    shape = (picture.height, picture.width, 3)
    n = math.prod(shape)
    bits = random_words(-(-n // 4), seed).astype("<u8").view("<u2")[:n].reshape(shape)
    noisy = np.asarray(picture).astype(np.int16) + noise_table(deviation)[bits]
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def _central(picture: Picture, stays: float, *, border: bool) -> Picture:
    """The central part, enlarged again or with a black border; of a square."""
    box = central_box(picture.width, stays)
    if not border:
        return picture.resize(picture.size, Image.Resampling.BICUBIC, box)
    canvas = Image.new("RGB", picture.size)
    canvas.paste(picture.crop(box), box[:2])
    return canvas


_OPERATIONS: dict[str, Callable[[Picture, float, int], Any]] = {
    "identity": lambda picture, *_: picture,
    "flip left-right": lambda picture, *_: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "flip top-bottom": lambda picture, *_: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "grey": lambda picture, *_: picture.convert("L").convert("RGB"),
    "shear_x": lambda picture, slope, _: _shear(picture, slope, 0.0),
    "shear_y": lambda picture, slope, _: _shear(picture, 0.0, slope),
    "translate_x": lambda picture, pixels, _: _translate(picture, pixels, 0.0),
    "translate_y": lambda picture, pixels, _: _translate(picture, 0.0, pixels),
    "rotate": lambda picture, degrees, _: _ops().rotate(picture, degrees),
    "brightness": lambda picture, factor, _: _ops().adjust_brightness(picture, factor),
    "color": lambda picture, factor, _: _ops().adjust_saturation(picture, factor),
    "contrast": lambda picture, factor, _: _ops().adjust_contrast(picture, factor),
    "sharpness": lambda picture, factor, _: _ops().adjust_sharpness(picture, factor),
    "posterize": lambda picture, bits, _: _ops().posterize(picture, int(bits)),
    "solarize": lambda picture, threshold, _: _ops().solarize(picture, threshold),
    "autocontrast": lambda picture, *_: _ops().autocontrast(picture),
    "equalize": lambda picture, *_: _ops().equalize(picture),
    "hue": lambda picture, turns, _: _ops().adjust_hue(picture, turns),
    "blur": lambda picture, deviation, _: _blur(picture, deviation),
    "noise": _noise,
    "central crop": lambda picture, stays, _: _central(picture, stays, border=False),
    "central crop with a border": lambda picture, stays, _: _central(picture, stays, border=True),
}


def apply(picture: Picture, operations: Sequence[Operation]) -> Picture:
    """A plan, carried out in its order.

    Args:
        picture: RGB; a central crop takes a square.
        operations: of a plan.
    """
    for name, amount, seed in operations:
        picture = _OPERATIONS[name](picture, amount, seed)
    return picture
