"""Parameter groups, and the builders of the update rules that config/optimizers.py lists.

Weight decay is decoupled in all: p <- (1 - lr decay) p beside the step.

Elementwise rules (adamw, sgd, lion, nadam, radam) do not see how ZeRO cuts parameters. adamp, lamb and lars do, and
are ours (engine/zero/layerwise.py): a library's would be silently wrong on ZeRO's flat shards.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from amclr_scale.config.schema import Optimizer
from amclr_scale.engine.zero.alignment import aligned_order, granularity
from amclr_scale.engine.zero.layerwise import LAMB, LARS, AdamP
from amclr_scale.torchvision_ops import import_torchvision

Groups = list[dict[str, Any]]

# The part of the model a parameter belongs to, by the first word of its name; each has a learning-rate factor.
PARTS = {
    "image_tower": "image_tower",
    "text_tower": "text_tower",
    "image_head": "heads",
    "text_head": "heads",
    "taps": "heads",
    "logit_scale": "temperature",
    "logit_bias": "temperature",
    "parts": "heads",  # of the objective
}


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    no_decay: Collection[str],
    optimizer: Optimizer,
    factors: Mapping[str, str] | None = None,
    depths: Mapping[str, int] | None = None,
) -> Groups:
    """Groups by learning-rate factor and by whether weight decay applies (never to biases, norms, scale and bias).

    Each group's `lr_factor` multiplies the schedule. `layerwise`: its parameters are of those that weight decay applies
    to, however large it is; LAMB and LARS rescale their steps. Groups, and parameters in them, come in the order in
    which ZeRO's flat buffers align them (engine/zero/alignment.py).

    Args:
        factors: beginnings of names -> key of lr_factors, over those of `PARTS`; the longest that fits counts.
        depths: names -> how often layer_decay multiplies; others: never.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        factor = _factor(name, optimizer, factors) * optimizer.layer_decay ** (depths or {}).get(name, 0)
        groups.setdefault((factor, name not in no_decay), []).append(parameter)
    return [
        {
            "params": aligned_order(parameters),
            "lr_factor": factor,
            "weight_decay": optimizer.weight_decay if decays else 0.0,
            "layerwise": decays,
        }
        for (factor, decays), parameters in sorted(
            groups.items(), key=lambda group: min(map(granularity, group[1])), reverse=True
        )
    ]


def _factor(name: str, optimizer: Optimizer, factors: Mapping[str, str] | None) -> float:
    known = {**PARTS, **(factors or {})}
    fitting = [beginning for beginning in known if name == beginning or name.startswith(f"{beginning}.")]
    return float(getattr(optimizer.lr_factors, known[max(fitting, key=len)])) if fitting else 1.0


def freeze(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: Optimizer, factors: Mapping[str, str] | None = None
) -> None:
    """Parameters whose learning-rate factor is 0 get no gradient: none in the norm, no moments, no decay.

    Args:
        factors: as for `parameter_groups`.
    """
    for name, parameter in named_parameters:
        if _factor(name, optimizer, factors) == 0:
            parameter.requires_grad_(False)


def set_learning_rate(groups: Groups, lr: float) -> None:
    """Set every group to its factor of the schedule's value."""
    for group in groups:
        group["lr"] = lr * group["lr_factor"]


def _apex_fused_adam() -> Any:
    """NVIDIA apex's FusedAdam, or None: PyPI's `apex` is another package, and a broken build may raise anything."""
    try:
        from apex.optimizers import FusedAdam
    except Exception:
        return None
    return FusedAdam


@dataclass(frozen=True)
class Where:
    """Where an optimizer is to work."""

    device: torch.device
    offload: bool = False  # its states live on the CPU (ZeRO offload)
    zero_stage: int = 0

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"


Built = tuple[torch.optim.Optimizer, str]


def build_optimizer(
    o: Optimizer, groups: Groups, device: torch.device, *, offload: bool = False, zero_stage: int = 0
) -> Built:
    """The update rule that the recipe names, and who provides it (for the log)."""
    built: Built = o.rule.builder()(o, groups, Where(device, offload, zero_stage))
    return built


def _adam(o: Optimizer) -> dict[str, Any]:
    return {"lr": o.lr, "betas": o.betas, "eps": o.eps}


def adamw(o: Optimizer, groups: Groups, where: Where) -> Built:
    """DeepSpeed's own under offload, apex's or torch's fused one on CUDA, torch's plain one on a CPU.

    Stage 3 steps one piece at a time, with every other group empty. apex counts steps by the calls and looks at each
    group's first tensor: it would fail, or correct its moments for steps that never were.
    """
    if where.offload and where.cuda:  # compiled at first use, which a run without a GPU need not wait for
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=True, **_adam(o)), "DeepSpeed's CPU AdamW"
    apex = _apex_fused_adam() if where.cuda and where.zero_stage < 3 else None
    if apex is not None:
        return apex(groups, adam_w_mode=True, **_adam(o)), "NVIDIA apex's fused AdamW"
    return torch.optim.AdamW(groups, fused=where.cuda, **_adam(o)), f"torch's {'fused ' if where.cuda else ''}AdamW"


def sgd(o: Optimizer, groups: Groups, where: Where) -> Built:
    """timm's: torch's own adds the decay to the gradient, and momentum multiplies it."""
    import_torchvision()  # timm imports it
    from timm.optim import SGDW

    nesterov = o.nesterov and o.momentum > 0
    return SGDW(groups, lr=o.lr, momentum=o.momentum, nesterov=nesterov), f"timm's {'Nesterov ' * nesterov}SGDW"


def nadam(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Torch's."""
    return torch.optim.NAdam(groups, decoupled_weight_decay=True, **_adam(o)), "torch's NAdam"


def radam(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Torch's."""
    return torch.optim.RAdam(groups, decoupled_weight_decay=True, **_adam(o)), "torch's RAdam"


def lion(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Timm's."""
    import_torchvision()
    from timm.optim import Lion

    return Lion(groups, lr=o.lr, betas=o.betas), "timm's Lion"


def adamp(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Ours: row by row on ZeRO's flat shards."""
    return AdamP(groups, nesterov=o.nesterov, **_adam(o)), "our AdamP"


def lamb(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Ours: layer by layer on ZeRO's flat shards."""
    return LAMB(groups, **_adam(o)), "our LAMB"


def lars(o: Optimizer, groups: Groups, where: Where) -> Built:
    """Ours: layer by layer on ZeRO's flat shards."""
    return LARS(groups, lr=o.lr, momentum=o.momentum), "our LARS"
