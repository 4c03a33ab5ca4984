"""Plans carried out on many pictures at once, on the device that holds them: the bytes that Pillow gives, exactly.

At each step the pictures of one operation are gathered, changed together and written back. Which ones these are is
found on the host, where the plans are, and copied in one piece from pinned memory: nothing asks the device for an
answer, and the host never waits for it (but at the first use of a shape, while tables are made).

Exact on every device: only integers, tables made on the host, and single IEEE additions and multiplications, each a
call of its own, so that no compiler fuses two. How each operation gets there is said where it is, in `colours` and
`geometry`.
"""

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from amclr_scale.data.augmentation import colours, geometry
from amclr_scale.data.augmentation.plans import CODES, NAMES
from amclr_scale.data.augmentation.tables import Rows, on_device
from amclr_scale.data.randomness import mix

AT_ONCE = 2**23  # values: 55 pictures of 224 pixels a side
BYTES_EACH = 30  # of such a value, at the worst moment of the operation that holds most

_OPERATIONS: dict[str, Callable[[Tensor, Rows], Tensor]] = {
    "flip left-right": lambda pictures, _: pictures.flip(3),
    "flip top-bottom": lambda pictures, _: pictures.flip(2),
    "grey": colours.grey,
    "shear_x": geometry.nearest("shear_x"),
    "shear_y": geometry.nearest("shear_y"),
    "translate_x": geometry.nearest("translate_x"),
    "translate_y": geometry.nearest("translate_y"),
    "rotate": geometry.nearest("rotate"),
    "brightness": colours.brightness,
    "color": colours.saturation,
    "contrast": colours.contrast,
    "sharpness": geometry.sharpness,
    "posterize": colours.posterize,
    "solarize": colours.solarize,
    "autocontrast": colours.autocontrast,
    "equalize": colours.equalize,
    "hue": colours.hue,
    "blur": geometry.blur,
    "noise": colours.noise,
    "central crop": geometry.central_crop,
    "central crop with a border": geometry.central_crop_with_border,
}
# Drawn from a range, so that hardly two samples share an amount: these take one per row. The others have a table or a
# matrix for an amount, of which a recipe has one or two.
_AMOUNT_BY_ROW = [CODES[name] for name in ("brightness", "color", "contrast", "sharpness", "hue")]


def _groups(codes: NDArray[np.int64], amounts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of rows that are changed together, of rows sorted by code and amount."""
    apart = (amounts[1:] != amounts[:-1]) & ~np.isin(codes[1:], _AMOUNT_BY_ROW)
    starts = np.flatnonzero((codes[1:] != codes[:-1]) | apart) + 1
    edges = [0, *starts.tolist(), len(codes)]
    yield from itertools.pairwise(edges)


def apply_all(pictures: Tensor, plans: Tensor) -> Tensor:
    """Every picture's own operations, in their order.

    Args:
        pictures: (n, 3, size, size) uint8, on any device; they stay as they are.
        plans: (n, steps, 3) int64 on the host, each from `encode`.

    Returns:
        (n, 3, size, size) uint8 on that device; a row does not depend on the others.

    Raises:
        ValueError: shapes, types or the plans' device are other ones.
    """
    n, size = pictures.shape[0], pictures.shape[-1]
    if pictures.dtype != torch.uint8 or pictures.shape != (n, 3, size, size):
        raise ValueError(f"expected (n, 3, size, size) uint8, got {tuple(pictures.shape)} {pictures.dtype}")
    if plans.dtype != torch.int64 or plans.shape != (n, plans.shape[1], 3) or plans.device.type != "cpu":
        raise ValueError(f"expected plans (n, steps, 3) int64 on the host, got {tuple(plans.shape)} {plans.dtype}")
    pictures = pictures.clone(memory_format=torch.contiguous_format)
    codes, amounts, seeds = plans.numpy().transpose(2, 1, 0)  # (steps, n) each
    order = np.lexsort((amounts, codes))  # by code, then by amount, at every step
    codes, amounts, seeds = (np.take_along_axis(rows, order, 1) for rows in (codes, amounts, seeds))
    states = np.zeros_like(seeds)
    for place in zip(*np.nonzero(codes == CODES["noise"]), strict=True):
        states[place] = np.array(mix(int(seeds[place])), np.uint64).astype(np.int64)
    moved = on_device(np.stack([order, amounts, states]), pictures.device)
    at_once = max(1, AT_ONCE // max(1, 3 * size * size))
    for step in range(len(codes)):
        for first, end in _groups(codes[step], amounts[step]) if n else ():
            name = NAMES[codes[step, first]]
            if name == "identity":
                continue
            amount = amounts[step, first : first + 1].view(np.float64).item()
            for start in range(first, end, at_once):
                where, given, state = moved[:, step, start : min(end, start + at_once)]
                rows = Rows(amount, given.view(torch.float64), state)
                pictures.index_copy_(0, where, _OPERATIONS[name](pictures.index_select(0, where), rows))
    return pictures
