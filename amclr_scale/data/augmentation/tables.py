"""What the batched operations share: the rows that they change, copies to a device, and lookups."""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor


class Rows(NamedTuple):
    """What the plans of m pictures say about one operation.

    Args:
        amount: of the first picture, and of all where an operation has few amounts.
        amounts: (m,) float64 on the device.
        states: (m,) int64 on the device, the hashed seeds of those that draw.
    """

    amount: float
    amounts: Tensor
    states: Tensor

    def factors(self) -> Tensor:
        """(m, 1, 1, 1) float32: amounts as Pillow's C code takes them."""
        return self.amounts.to(torch.float32)[:, None, None, None]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy there of a tensor of the host, who does not wait for it."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def on_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """The same of an array."""
    return to_device(torch.from_numpy(array), device)


def looked_up(table: Tensor, places: Tensor) -> Tensor:
    """table[places] of a table with one dimension, in the shape of the places (any integers)."""
    return table.index_select(0, places.reshape(-1)).view(places.shape)


def by_level(pictures: Tensor, levels: Tensor) -> Tensor:
    """Each pixel replaced by the entry of its level.

    Args:
        pictures: (m, 3, size, size) uint8.
        levels: (m, 3, 256) or (m, 1, 256) uint8, of every picture, of its channels or of all three.
    """
    m = len(pictures)
    flat = pictures.reshape(3 * m, -1).long()
    return levels.expand(m, 3, 256).reshape(3 * m, 256).gather(1, flat).view(pictures.shape)


def to_levels(values: Tensor) -> Tensor:
    """Clamped to 0 .. 255 and cut off to integers, as Pillow does."""
    return values.clamp_(0, 255).to(torch.uint8)
