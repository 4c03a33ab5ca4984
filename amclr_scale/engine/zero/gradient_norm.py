"""The norm of ZeRO's averaged gradients in a few launches, and one wait for the device.

DeepSpeed's own step asks every gradient twice, by itself: whether it holds an infinity or NaN (ten small operations),
and for its norm in float64 (three). For ViT-B/32 that is 4,000 launches, 39 ms of a step of 217 ms on an H200, and
eight waits. One multi-tensor norm answers both questions: it is finite exactly where every entry is. Norms are float64,
as DeepSpeed's are, so the step is the same to the last digit but one.

Stages 1 and 2 with gradients on the device. Elsewhere (offload, stage 3) DeepSpeed's own stay.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def square_sum(gradients: Sequence[Tensor]) -> Tensor:
    """The sum of squares of all entries, float64, on their device; not finite where one entry is not."""
    by_type: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        if gradient.numel():
            by_type[gradient.dtype].append(gradient.detach())
    norms = [n for alike in by_type.values() for n in torch._foreach_norm(alike, 2, dtype=torch.float64)]
    if not norms:
        device = gradients[0].device if gradients else None
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack(norms).square().sum()


def fuse_norm(zero: Any, stage: int) -> bool:
    """Let ZeRO's optimizer take its norm, and look for overflow, in one go. Returns whether it does.

    Args:
        zero: `engine.optimizer`, ZeRO's wrapper around the optimizer.
        stage: ZeRO stage, 0 to 3.
    """
    if stage not in (1, 2) or zero.cpu_offload or zero.has_moe_layers or not zero.compute_grad_norm:
        return False

    def no_overflow_yet(partition_gradients: bool = True) -> None:
        zero.overflow = False  # the norm will tell: `step` rejects one that is not finite

    def norm(norm_type: float = 2) -> Tensor:
        """Of all groups, over all ranks; on the host, infinite where it is not finite."""
        assert norm_type == 2
        own = list[Tensor]()
        for group, parameters in enumerate(zero.params_in_partition):
            held = [g for g in zero.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
            own += held[: len(parameters)]
        total = square_sum(own) if own else torch.zeros((), dtype=torch.float64, device=zero.device)
        dist.all_reduce(total, group=zero.dp_process_group)
        found = total.sqrt().float().cpu()  # the step's one wait
        return torch.where(found.isfinite(), found, torch.full_like(found, torch.inf))

    zero.check_overflow = no_overflow_yet
    zero.scaled_global_norm = norm
    return True
