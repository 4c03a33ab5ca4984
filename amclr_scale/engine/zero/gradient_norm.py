"""The norm of ZeRO's averaged gradients in a few launches, and one wait for the device.

DeepSpeed's own step asks every gradient twice, by itself: whether it holds an infinity or NaN (ten small operations),
and for its norm in float64 (three). For ViT-B/32 that is 4,000 launches, 39 ms of a step of 217 ms on an H200, and
eight waits. One multi-tensor norm answers both questions: it is finite exactly where every entry is. Norms are float64,
as DeepSpeed's are, so the step is the same to the last digit but one.

At stage 3 DeepSpeed takes a norm for every group, one tensor after another and with a message each, waits for their
sum and, where it is read, once more; in fp16 it first looks for overflow as well. Here too that becomes one wait, and
what else the ranks want to know of one another (`module_order.py`) comes with it.

With gradients on the device. Elsewhere (offload) DeepSpeed's own stay.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from amclr_scale.engine.zero.module_order import ModuleOrders


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


def fuse_norm(zero: Any, stage: int, orders: ModuleOrders | None = None) -> bool:
    """Let ZeRO's optimizer take its norm, and look for overflow, in one go. Returns whether it does.

    Args:
        zero: `engine.optimizer`, ZeRO's wrapper around the optimizer.
        stage: ZeRO stage, 0 to 3.
        orders: of modules, to be compared before the step changes a weight (stage 3).
    """
    if stage == 3:
        return _fuse_stage3(zero, orders)
    if stage not in (1, 2) or zero.cpu_offload or zero.has_moe_layers or not zero.compute_grad_norm:
        return False

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

    zero.check_overflow = _no_overflow_yet(zero)
    zero.scaled_global_norm = norm
    return True


def _no_overflow_yet(zero: Any) -> Callable[..., None]:
    """In place of DeepSpeed's look for overflow."""

    def check_overflow(partition_gradients: bool = True) -> None:
        zero.overflow = False  # the norm will tell: `step` rejects one that is not finite

    return check_overflow


def _fuse_stage3(zero: Any, orders: ModuleOrders | None) -> bool:
    if not hasattr(zero, "_get_norm_groups"):  # `orders` compares by itself
        return False
    theirs = zero._get_norm_groups
    parameters = [p for group in zero.fp16_groups for p in group]
    whole = dist.get_world_size(zero.dp_process_group)
    everywhere = all(
        dist.get_world_size(getattr(p, "ds_process_group", zero.dp_process_group)) == whole for p in parameters
    )
    fused = not zero.offload_optimizer and not getattr(zero, "use_muon", False) and everywhere

    def checked() -> Any:
        if orders is not None:
            orders.check(orders.numbers().cpu())
        return theirs()

    def norms() -> list[Tensor]:
        """Of each group, over all ranks; on the host, -1 where it is not finite."""
        sums = torch.stack([square_sum(zero.averaged_gradients[group]) for group in range(len(zero.fp16_groups))])
        dist.all_reduce(sums, group=zero.dp_process_group)
        of_ranks = torch.empty(0, dtype=torch.int64, device=sums.device) if orders is None else orders.numbers()
        found = torch.cat([sums.view(torch.int64), of_ranks]).cpu()  # the step's one wait, bit for bit
        if orders is not None:
            orders.check(found[len(sums) :])
        roots = found[: len(sums)].view(torch.float64).sqrt()
        return list(torch.where(roots.isfinite(), roots, -1.0))

    zero._get_norm_groups = norms if fused else checked
    if fused:
        zero.check_overflow = _no_overflow_yet(zero)
    return fused
