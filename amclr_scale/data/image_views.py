"""Image views: random crops, flips and colour, per sample, on 8-bit pixels, before any normalisation.

The operations are torchvision's (transforms v2, on PIL images); the random numbers are ours, drawn from (seed, pass,
id, view) in a fixed order, so that a view does not depend on the worker that makes it or on torchvision's release.

* Random resized crop: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842.
* RandAugment: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
  NeurIPS 2020, arXiv:1909.13719; operations and ranges as in torchvision.

A large JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves the recipe's smallest crop enough pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.randomness import Draws
from amclr_scale.torchvision_ops import import_torchvision

Picture = Image.Image
Box = tuple[int, int, int, int]  # left, upper, right, lower


@cache
def _ops() -> Any:
    """torchvision.transforms.v2.functional; a second's import, so only where an operation of it is drawn."""
    import_torchvision()
    from torchvision.transforms.v2 import functional

    return functional


def random_box(draws: Draws, width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float]) -> Box:
    """A box with an area share in `scale` and an aspect ratio (log-uniform) in `ratio`.

    After ten misses, the largest centred one with an allowed ratio.
    """
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(10):
        area = width * height * draws.uniform(*scale)
        aspect = math.exp(draws.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = draws.below(width - w + 1), draws.below(height - h + 1)
            return left, upper, left + w, upper + h
    w = min(width, max(1, round(height * ratio[1])))
    h = min(height, max(1, round(width / ratio[0])))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def reduction_for(image: Picture, size: int, recipes: Sequence[schema.ImageAugmentation]) -> int:
    """How far a JPEG may be reduced while it is decoded, so that the smallest crop still has size x size pixels."""
    scale = min(recipe.crop_scale[0] for recipe in recipes)
    ratio = max(max(recipe.crop_ratio[1], 1 / recipe.crop_ratio[0]) for recipe in recipes)
    narrowest = math.sqrt(image.width * image.height * scale / ratio)
    reduction = 8
    while reduction > 1 and min(narrowest, *image.size) < reduction * size:
        reduction //= 2
    return reduction


def _centred_square(picture: Picture) -> Box:
    side = min(picture.size)
    left, upper = (picture.width - side) // 2, (picture.height - side) // 2
    return left, upper, left + side, upper + side


def _resized(picture: Picture, box: Box, size: int) -> Picture:
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)  # antialiased; the crop costs nothing


def evaluation_view(picture: Picture, size: int) -> Picture:
    """The whole shorter side: the centred square, resized to size x size."""
    return _resized(picture, _centred_square(picture), size)


def _color_jitter(picture: Picture, strength: float, draws: Draws) -> Picture:
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


def _randaugment(picture: Picture, operations: int, magnitude: int, draws: Draws) -> Picture:
    names = list(_RANDAUGMENT)
    for _ in range(operations):
        largest, signed, operation = _RANDAUGMENT[names[draws.below(len(names))]]
        size = largest * magnitude / 30
        picture = operation(picture, -size if signed and draws.chance(0.5) else size)
    return picture


def augmented_view(picture: Picture, size: int, recipe: schema.ImageAugmentation, draws: Draws) -> Picture:
    """One random view of a decoded RGB image, size x size."""
    if recipe.crop_scale == (1.0, 1.0):
        box = _centred_square(picture)
    else:
        box = random_box(draws, *picture.size, recipe.crop_scale, recipe.crop_ratio)
    picture = _resized(picture, box, size)
    if draws.chance(recipe.flip):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.randaugment:
        picture = _randaugment(picture, *recipe.randaugment, draws)
    if recipe.color_jitter:
        picture = _color_jitter(picture, recipe.color_jitter, draws)
    if draws.chance(recipe.grayscale):
        picture = picture.convert("L").convert("RGB")
    return picture


def to_tensor(picture: Picture) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
