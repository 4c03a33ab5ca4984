"""Parameter groups and optimizers by name."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from amclr_scale.config.schema import Optimizer


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], no_decay: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: with weight decay, and without (biases, norms, logit_scale, logit_bias)."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (kept if name in no_decay else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def build_optimizer(optimizer: Optimizer, groups: list[dict[str, Any]], device: torch.device) -> torch.optim.Optimizer:
    """The update rule that the recipe names; one kernel for all parameters on CUDA (and on CPU, where torch has it)."""
    return torch.optim.AdamW(groups, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=device.type == "cuda")
