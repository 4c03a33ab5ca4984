"""The pixels of all pictures on one device, where crops are cut out of them (data/augmentation)."""

import torch
from torch import Tensor

from amclr_scale.data.augmentation.cropping import MOST_REDUCED
from amclr_scale.data.resident.store import ResidentData
from amclr_scale.errors import UserError

_AT_ONCE = 1 << 28  # bytes


def pixels_on(device: torch.device, data: ResidentData, size: int) -> Tensor:
    """(P, 3) uint8 there; the picture of sample i begins at `data.starts[i] // 3`.

    Args:
        size: of views, in pixels a side.

    Raises:
        UserError: a picture is too long for such views.
    """
    longest = int(data.sizes.max(initial=0))
    if longest > MOST_REDUCED * size:
        raise UserError(
            f"data.resident: device reduces sides of at most {MOST_REDUCED * size:,} pixels to {size}, got "
            f"{longest:,}; use data.resident=host"
        )
    found = torch.empty(len(data.pixels), dtype=torch.uint8, device=device)
    for start in range(0, len(found), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found[part] = torch.from_numpy(data.pixels[part].copy()).to(device)
    return found.view(-1, 3)
