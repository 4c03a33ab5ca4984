"""Image views: random crops, flips and colour, per sample, on 8-bit pixels, before any normalisation.

The operations are torchvision's (transforms v2, on PIL images); the random numbers are ours, drawn from (seed, pass,
id, view) in a fixed order, so that a view does not depend on the worker that makes it or on torchvision's release.

* Random resized crop: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842.
* RandAugment and AmCLR's operations: `data/image_operations.py`.

A large JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves the recipe's smallest crop enough pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.image_operations import Picture, amclr_operation, color_jitter, randaugment
from amclr_scale.data.randomness import Draws

Box = tuple[int, int, int, int]  # left, upper, right, lower


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


def _centred_square(width: int, height: int) -> Box:
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def crop_box(width: int, height: int, recipe: schema.ImageAugmentation, draws: Draws) -> Box:
    """What a recipe cuts out of a picture of that size: the first thing that is drawn of a view."""
    if recipe.crop_scale == (1.0, 1.0):
        return _centred_square(width, height)
    return random_box(draws, width, height, recipe.crop_scale, recipe.crop_ratio)


def _resized(picture: Picture, box: Box, size: int) -> Picture:
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)  # antialiased; the crop costs nothing


def evaluation_view(picture: Picture, size: int, *, squash: bool = False) -> Picture:
    """The whole shorter side: the centred square, resized to size x size; `squash`: all of it, proportions lost."""
    return _resized(picture, (0, 0, *picture.size) if squash else _centred_square(*picture.size), size)


def augmented_view(picture: Picture, size: int, recipe: schema.ImageAugmentation, draws: Draws) -> Picture:
    """One random view of a decoded RGB image, size x size."""
    picture = _resized(picture, crop_box(*picture.size, recipe, draws), size)
    if draws.chance(recipe.flip):
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if recipe.randaugment:
        picture = randaugment(picture, *recipe.randaugment, draws)
    if recipe.color_jitter:
        picture = color_jitter(picture, recipe.color_jitter, draws)
    if draws.chance(recipe.grayscale):
        picture = picture.convert("L").convert("RGB")
    if draws.chance(recipe.amclr):
        picture = amclr_operation(picture, recipe.amclr_strength, draws)
    return picture


def to_tensor(picture: Picture) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)


def count_repeated(views: tuple[Tensor, ...]) -> Tensor:
    """How many rows of further views equal that row of an earlier one: a number, where the views are."""
    same = [torch.stack([_equal_rows(view, other) for other in views[:k]]).any(0) for k, view in enumerate(views) if k]
    return torch.stack(same).sum() if same else torch.zeros((), dtype=torch.int64)


def _equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """(n,) bool. On the host most are told by a few columns; a device is not waited for."""
    a, b = a.flatten(1), b.flatten(1)
    if a.device.type != "cpu":
        return (a == b).all(1)
    equal = (a[:, :: max(1, a.shape[1] // 64)] == b[:, :: max(1, a.shape[1] // 64)]).all(1)
    if equal.any():
        equal[equal.clone()] = (a[equal] == b[equal]).all(1)
    return equal
