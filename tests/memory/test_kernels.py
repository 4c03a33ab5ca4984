"""What a trace takes for CUDA's autocast is what torch registers for it."""

import pytest
import torch
from torch import nn

from amclr_scale.memory.kernels import WIDENED, kernels_of


@pytest.mark.parametrize("name", [*WIDENED, "group_norm"])
def test_cuda_has_a_rule_of_its_own_where_a_cpu_has_none(name):
    overloads = [f"aten::{name}", f"aten::{name}.int", f"aten::{name}.Tensor_Scalar"]
    found = {key: [has(overload, key) for overload in overloads] for key in ("AutocastCUDA", "AutocastCPU")}
    assert any(found["AutocastCUDA"])
    assert not any(found["AutocastCPU"])


def has(overload: str, key: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(overload, key)
    except RuntimeError:  # there is no such overload
        return False


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32)])
def test_norms_give_float32_on_cuda_alone(device, dtype):
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    for norm in (nn.LayerNorm(8), nn.GroupNorm(2, 8)):
        with kernels_of(device), torch.autocast("cpu", torch.bfloat16):
            assert norm(x).dtype == dtype
        with kernels_of(device):
            assert norm.bfloat16()(x).dtype == torch.bfloat16
