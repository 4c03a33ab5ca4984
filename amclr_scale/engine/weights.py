"""Change a parameter by hand under DeepSpeed, at every stage and precision.

The weight a module computes with and the fp32 master that the optimizer steps are not always the same tensor. An
in-place change of the first is undone by the next step at stages 1 to 3, a change of the second alone reaches the
module one step late: so both are set.
"""

from typing import Any

import torch
from torch import nn


def clamp_(engine: Any, parameter: nn.Parameter, low: float, high: float) -> None:
    """Clamp a parameter that the engine trains, in the module and in the optimizer's master copy.

    All ranks call it. Tested for each stage and precision (tests/engine/test_weights.py).
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

    master = safe_get_full_fp32_param(parameter) if hasattr(parameter, "_hp_mapping") or hasattr(parameter, "ds_id") else None
    value = (parameter.detach().float() if master is None else master.float()).clamp(low, high)
    if master is not None:
        safe_set_full_fp32_param(parameter, value)
    with torch.no_grad():
        parameter.copy_(value)
