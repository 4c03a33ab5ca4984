"""What is to happen to a picture, drawn before any of its pixels is touched: a box, and operations with their amounts.

The random numbers are ours, drawn from (seed, pass, id, view) in a fixed order, so that a view does not depend on the
worker that makes it, on a library's release, or on whether Pillow or a GPU carries the plan out.

* Random resized crop: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, arXiv:1409.4842.
* RandAugment: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
  NeurIPS 2020, arXiv:1909.13719; operations and ranges as in torchvision.
* Colour jitter: brightness, contrast, saturation and hue in random order, as in torchvision.
* AmCLR's eight operations. The released code draws one for a whole batch, after normalisation, where its clamps to
  [0, 1] wipe out every pixel darker than the mean, and two of its crops change the size or shift the picture. Here one
  is drawn per sample, before normalisation; crops are centred and keep the size.

A recipe's plans all have the same length: what chance leaves out is the identity, in its place. The k-th operations of
a batch are then of the same kind, and many samples share each of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from amclr_scale.config import schema
from amclr_scale.data.randomness import Draws

Box = tuple[int, int, int, int]  # left, upper, right, lower

# What an amount means, by name. A number of `encode` is a place in this table.
NAMES = (
    "identity",
    "flip left-right",
    "flip top-bottom",
    "grey",
    "shear_x",  # slope
    "shear_y",
    "translate_x",  # pixels
    "translate_y",
    "rotate",  # degrees, counter-clockwise
    "brightness",  # factor; 1 changes nothing, as in the next three
    "color",
    "contrast",
    "sharpness",
    "posterize",  # bits that stay
    "solarize",  # the level from which pixels are inverted
    "autocontrast",
    "equalize",
    "hue",  # turns, -0.5 .. 0.5
    "blur",  # standard deviation in pixels
    "noise",  # standard deviation in units of the full range
    "central crop",  # pixels a side that stay
    "central crop with a border",
)
CODES = {name: code for code, name in enumerate(NAMES)}


class Operation(NamedTuple):
    """One change to a picture.

    Args:
        name: one of `NAMES`, where the unit of the amount stands.
        amount: how much.
        seed: 64 bits, where the operation draws a number per pixel.
    """

    name: str
    amount: float = 0.0
    seed: int = 0


IDENTITY = Operation("identity")


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
    return centred_box(width, height, w, h)


def centred_box(width: int, height: int, w: int, h: int) -> Box:
    """The w x h pixels in the middle of width x height."""
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def centred_square(width: int, height: int) -> Box:
    """The largest one."""
    side = min(width, height)
    return centred_box(width, height, side, side)


def crop_box(width: int, height: int, recipe: schema.ImageAugmentation, draws: Draws) -> Box:
    """What a recipe cuts out of a picture of that size: the first thing that is drawn of a view."""
    if recipe.crop_scale == (1.0, 1.0):
        return centred_square(width, height)
    return random_box(draws, width, height, recipe.crop_scale, recipe.crop_ratio)


# name: (size of the effect at magnitude 30, whether its sign is drawn, the amount of an effect on so many pixels)
_RANDAUGMENT: dict[str, tuple[float, bool, Callable[[float, int], float]]] = {
    "identity": (0.0, False, lambda effect, size: effect),
    "shear_x": (0.3, True, lambda effect, size: effect),
    "shear_y": (0.3, True, lambda effect, size: effect),
    "translate_x": (150 / 331, True, lambda effect, size: int(effect * size)),
    "translate_y": (150 / 331, True, lambda effect, size: int(effect * size)),
    "rotate": (30.0, True, lambda effect, size: effect),
    "brightness": (0.9, True, lambda effect, size: 1 + effect),
    "color": (0.9, True, lambda effect, size: 1 + effect),
    "contrast": (0.9, True, lambda effect, size: 1 + effect),
    "sharpness": (0.9, True, lambda effect, size: 1 + effect),
    "posterize": (4.0, False, lambda effect, size: 8 - round(effect)),
    "solarize": (255.0, False, lambda effect, size: 255 - effect),
    "autocontrast": (0.0, False, lambda effect, size: effect),
    "equalize": (0.0, False, lambda effect, size: effect),
}


def _randaugment(operations: int, magnitude: int, size: int, draws: Draws) -> list[Operation]:
    """That many, drawn with replacement, all at one magnitude (0 .. 30)."""
    names, chosen = list(_RANDAUGMENT), list[Operation]()
    for _ in range(operations):
        name = names[draws.below(len(names))]
        largest, signed, amount = _RANDAUGMENT[name]
        effect = largest * magnitude / 30
        chosen.append(Operation(name, amount(-effect if signed and draws.chance(0.5) else effect, size)))
    return chosen


def _color_jitter(strength: float, draws: Draws) -> list[Operation]:
    """Brightness, contrast, saturation within 1 +- strength, hue within a quarter of it, in random order."""
    steps = [
        Operation(name, draws.uniform(max(0.0, 1 - strength), 1 + strength))
        for name in ("brightness", "contrast", "color")
    ]
    steps.append(Operation("hue", draws.uniform(-min(0.5, strength / 4), min(0.5, strength / 4))))
    return [steps.pop(draws.below(len(steps))) for _ in range(len(steps))]


_AMCLR = (
    "blur", "flip", "noise", "brightness", "contrast", "sharpness", "central crop", "central crop with a border",
)  # fmt: skip


def _amclr_operation(name: str, strength: float, size: int, draws: Draws) -> tuple[Operation, Operation]:
    """One of the eight operations; `flip` is two: left-right, upside down, both, or neither."""
    match name:
        case "flip":
            across, down = draws.chance(0.5), draws.chance(0.5)
            return Operation("flip left-right") if across else IDENTITY, Operation(
                "flip top-bottom"
            ) if down else IDENTITY
        case "noise":
            return Operation(name, 0.05 * strength, draws.bits()), IDENTITY
        case "brightness" | "contrast":
            factor = max(0.0, draws.uniform(1 - 0.2 * strength, 1 + 0.2 * strength))
            return Operation(name, factor), IDENTITY
        case "sharpness":
            return Operation(name, 1 + strength), IDENTITY
        case "blur":
            return Operation(name, 0.8 * strength), IDENTITY
        case _:
            return Operation(name, max(1, round(size * max(0.1, 1 - 0.1 * strength)))), IDENTITY


def plan_view(
    width: int, height: int, recipe: schema.ImageAugmentation, draws: Draws, size: int
) -> tuple[Box, list[Operation]]:
    """One random view of a picture: the box that is resized to size x size, and what happens to it then.

    Args:
        width: of the decoded picture, in pixels.
        height: likewise.
        recipe: what may be drawn.
        draws: the view's own random numbers; nothing else may draw from them.
        size: of the view, in pixels a side.

    Returns:
        The box, and `most_operations(recipe)` operations.
    """
    box, operations = crop_box(width, height, recipe, draws), list[Operation]()
    flips = draws.chance(recipe.flip)
    if recipe.flip:
        operations.append(Operation("flip left-right") if flips else IDENTITY)
    if recipe.randaugment:
        operations += _randaugment(*recipe.randaugment, size, draws)
    if recipe.color_jitter:
        operations += _color_jitter(recipe.color_jitter, draws)
    greys = draws.chance(recipe.grayscale)
    if recipe.grayscale:
        operations.append(Operation("grey") if greys else IDENTITY)
    changes = draws.chance(recipe.amclr)
    if recipe.amclr:
        name = _AMCLR[draws.below(len(_AMCLR))] if changes else ""
        operations += _amclr_operation(name, recipe.amclr_strength, size, draws) if changes else (IDENTITY, IDENTITY)
    return box, operations


def most_operations(recipe: schema.ImageAugmentation) -> int:
    """How many operations each plan of a recipe has."""
    drawn = (recipe.randaugment or (0,))[0] + 4 * bool(recipe.color_jitter)
    return drawn + bool(recipe.flip) + bool(recipe.grayscale) + 2 * bool(recipe.amclr)


def encode(operations: Sequence[Operation], steps: int) -> Tensor:
    """A plan that travels with others in one tensor.

    Args:
        operations: at most `steps`.
        steps: how many rows there are to be; the last ones are the identity.

    Returns:
        (steps, 3) int64: the place in `NAMES`, the bits of the float64 amount, the bits of the seed.

    Raises:
        ValueError: there are more operations.
    """
    if len(operations) > steps:
        raise ValueError(f"expected at most {steps} operations, got {len(operations)}")
    plan = np.zeros((3, steps), np.uint64)
    for place, (name, amount, seed) in enumerate(operations):
        plan[0, place], plan[2, place] = CODES[name], seed
        plan[1, place : place + 1] = np.array([amount], np.float64).view(np.uint64)
    return torch.from_numpy(plan.T.view(np.int64).copy())
