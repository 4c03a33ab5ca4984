"""Image views: random crops, flips and colour, per sample, on 8-bit pixels, before any normalisation.

What is drawn of a view and by which papers: `data/augmentation/plans.py`.

A large JPEG is decoded at the smallest of 1/1, 1/2, 1/4, 1/8 that leaves the recipe's smallest crop enough pixels.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.augmentation.pictures import Picture, apply
from amclr_scale.data.augmentation.plans import Box, centred_square, plan_view
from amclr_scale.data.randomness import Draws


def reduction_for(image: Picture, size: int, recipes: Sequence[schema.ImageAugmentation]) -> int:
    """How far a JPEG may be reduced while it is decoded, so that the smallest crop still has size x size pixels."""
    scale = min(recipe.crop_scale[0] for recipe in recipes)
    ratio = max(max(recipe.crop_ratio[1], 1 / recipe.crop_ratio[0]) for recipe in recipes)
    narrowest = math.sqrt(image.width * image.height * scale / ratio)
    reduction = 8
    while reduction > 1 and min(narrowest, *image.size) < reduction * size:
        reduction //= 2
    return reduction


def _resized(picture: Picture, box: Box, size: int) -> Picture:
    return picture.resize((size, size), Image.Resampling.BICUBIC, box)  # antialiased; the crop costs nothing


def evaluation_view(picture: Picture, size: int, *, squash: bool = False) -> Picture:
    """The whole shorter side: the centred square, resized to size x size; `squash`: all of it, proportions lost."""
    return _resized(picture, (0, 0, *picture.size) if squash else centred_square(*picture.size), size)


def augmented_view(picture: Picture, size: int, recipe: schema.ImageAugmentation, draws: Draws) -> Picture:
    """One random view of a decoded RGB image, size x size."""
    box, operations = plan_view(*picture.size, recipe, draws, size)
    return apply(_resized(picture, box, size), operations)


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
