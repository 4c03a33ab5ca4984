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
