"""Pictures of another size than a model was trained with: its table of positions is interpolated to the new grid.

Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929 (section 3.2); by timm's function,
bicubic and antialiased. What stands before the patches, such as a class token's position, is kept.
"""

import math

import torch
from torch import Tensor

from amclr_scale.errors import UserError
from amclr_scale.torchvision_ops import import_torchvision

_BEFORE = (0, 1, 2, 5)  # rows that belong to no patch: none, a class token, also a distillation token, or registers


def fit_positions(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Interpolate, in `state`, the image tower's tables of positions that have another grid in `own`.

    Tables are (rows, width) or (1, rows, width), the patches' rows a square grid, last.

    Returns:
        What to tell about each.
    """
    notes = []
    for name, wanted in own.items():
        found = state.get(name)
        if found is None or found.shape == wanted.shape or not name.startswith("image_tower."):
            continue
        grids = _grids(tuple(found.shape), tuple(wanted.shape))
        if grids is None:
            continue
        before, old, new = grids
        state[name] = _resampled(found, before, new).reshape(wanted.shape).to(found.dtype)
        notes.append(f"model.init: positions {name} interpolated from {old} x {old} patches to {new} x {new}")
    return notes


def _grids(found: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Rows before the patches, and the sides of both grids; None where these are no such tables."""
    if (
        len(found) not in (2, 3)
        or len(found) != len(wanted)
        or found[-1] != wanted[-1]
        or {*found[:-2], *wanted[:-2]} - {1}
    ):
        return None
    for before in _BEFORE:
        old, new = (math.isqrt(max(0, rows - before)) for rows in (found[-2], wanted[-2]))
        if old and new and (old**2 + before, new**2 + before) == (found[-2], wanted[-2]):
            return before, old, new
    return None


def _resampled(table: Tensor, before: int, side: int) -> Tensor:
    try:
        import_torchvision()
        from timm.layers import resample_abs_pos_embed
    except ImportError as error:
        raise UserError(
            f"data.image_size: positions are interpolated by timm: pip install timm ({error}); or leave it at the size "
            "that model.init was trained with"
        ) from error
    found: Tensor = resample_abs_pos_embed(table.reshape(1, *table.shape[-2:]), [side, side], num_prefix_tokens=before)
    return found.to(torch.float32)
