"""The pixels of all pictures on one device, where crops are cut out of them (data/augmentation)."""

import numpy as np
import torch
from torch import Tensor

from amclr_scale.data.augmentation.cropping import AT_ONCE, MOST_REDUCED
from amclr_scale.data.resident.store import ResidentData
from amclr_scale.errors import UserError

_AT_ONCE = 1 << 28  # bytes


def pixels_on(device: torch.device, data: ResidentData, size: int) -> Tensor:
    """(P, 3) uint8 there; the picture of sample i begins at `data.starts[i] // 3`.

    Args:
        size: of views, in pixels a side.

    Raises:
        UserError: a picture is too large for such views, or too long.
    """
    longest, largest = int(data.sizes.max(initial=0)), int(data.sizes.astype(np.int64).prod(1).max(initial=0))
    if longest > MOST_REDUCED * size or largest > AT_ONCE:
        raise UserError(
            f"data.resident: expected pictures of at most {AT_ONCE:,} pixels, with sides of at most {MOST_REDUCED} x "
            f"data.image_size = {MOST_REDUCED * size:,}, for views that the device makes, got {largest:,} and "
            f"{longest:,}; set data.resident=host"
        )
    found = torch.empty(len(data.pixels), dtype=torch.uint8, device=device)
    for start in range(0, len(found), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        found[part] = torch.from_numpy(data.pixels[part].copy()).to(device)
    return found.view(-1, 3)
