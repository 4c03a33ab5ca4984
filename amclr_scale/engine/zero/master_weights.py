"""Change a parameter by hand under DeepSpeed, at every stage and precision.

The weight a module computes with and the fp32 master that the optimizer steps are not always the same tensor. An
in-place change of the first is undone by the next step at stages 1 to 3, a change of the second alone reaches the
module one step late: so both are set.
"""

from typing import Any

import torch
from torch import nn


def clamp_(parameter: Any, low: float, high: float) -> None:
    """Clamp a parameter that the engine trains, in the module and in the optimizer's master copy.

    All ranks call it. `parameter` is one of the engine's module, with what DeepSpeed hangs on it.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    value = full_fp32(parameter).clamp(low, high)
    if hasattr(parameter, "ds_id"):  # stage 3
        import deepspeed
        from deepspeed.utils import safe_set_local_fp32_param

        # This rank's part, cut here: DeepSpeed cuts a whole value too, but not one shorter than the number of ranks.
        part, rank = parameter.ds_tensor.ds_numel, deepspeed.comm.get_rank()
        padded = torch.cat([value.flatten(), value.new_zeros(part * deepspeed.comm.get_world_size() - value.numel())])
        safe_set_local_fp32_param(parameter, padded[rank * part : (rank + 1) * part])
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0), torch.no_grad():
            parameter.copy_(value)
        return
    if hasattr(parameter, "_hp_mapping"):  # stages 1 and 2
        safe_set_full_fp32_param(parameter, value)
    with torch.no_grad():
        parameter.copy_(value)


def full_fp32(parameter: nn.Parameter) -> torch.Tensor:
    """A parameter's whole fp32 value, wherever DeepSpeed keeps it. All ranks call it together."""
    from deepspeed.utils import safe_get_full_fp32_param

    if not parameter.requires_grad and parameter.numel() < getattr(parameter, "ds_numel", 0):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):  # frozen at stage 3: no optimizer has a master of it
            return parameter.detach().float().clone()
    master = safe_get_full_fp32_param(parameter)  # None at stage 0 in fp32: the weight is its own master
    return (parameter.detach() if master is None else master).float().clone()
