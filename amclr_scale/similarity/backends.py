"""Which backend computes blocks, and in which precision."""

import torch
from torch import Tensor

from amclr_scale.similarity.blocks import Blocks
from amclr_scale.similarity.settings import Settings
from amclr_scale.similarity.torch_backend import TorchBlocks


def blocks_for(settings: Settings, dtype: torch.dtype, like: Tensor) -> Blocks:
    """The backend for features like these. There is one so far; a fused one is chosen here."""
    return TorchBlocks(settings, dtype, like)


def similarity_dtype(*features: Tensor) -> torch.dtype:
    """float32, or float64 if any of the features is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in features) else torch.float32


def check_features(image: Tensor, text: Tensor) -> None:
    """Refuse what cannot be contrasted.

    Raises:
        ValueError: not two matrices of one shape with at least one row, of floating-point numbers, on one device.
    """
    if image.ndim != 2 or image.shape[0] == 0:
        raise ValueError(f"image: expected (b, D) with at least one row, got {tuple(image.shape)}")
    if text.shape != image.shape:
        raise ValueError(f"text: expected {tuple(image.shape)}, the shape of image, got {tuple(text.shape)}")
    for name, x in (("image", image), ("text", text)):
        if not x.is_floating_point():
            raise ValueError(f"{name}: expected floating-point features, got {x.dtype}")
    if text.device != image.device:
        raise ValueError(f"text: expected features on {image.device}, the device of image, got {text.device}")
