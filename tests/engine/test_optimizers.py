"""Who provides AdamW on a GPU: NVIDIA apex where it imports and is right, DeepSpeed under offload, torch elsewhere."""

import sys
from types import ModuleType

import deepspeed.ops.adam
import pytest
import torch

from amclr_scale.config.schema import Optimizer
from amclr_scale.engine.optimizers import build_optimizer
from amclr_scale.engine.step import _is_out_of_memory

CUDA = torch.device("cuda")


class Recorded:
    def __init__(self, groups, **options):
        self.groups, self.options = groups, options


def provider(monkeypatch, *, apex: bool, **where) -> tuple[object, str]:
    """What is built around parameters of the CPU, which constructors do not mind."""
    module = ModuleType("apex.optimizers")
    if apex:
        module.FusedAdam = Recorded
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    monkeypatch.setattr(deepspeed.ops.adam, "DeepSpeedCPUAdam", Recorded)
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_factor": 1.0, "weight_decay": 0.1}]
    return build_optimizer(Optimizer(betas=(0.8, 0.9), eps=1e-7), groups, CUDA, **where)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_apex_but_not_at_stage_3(monkeypatch, stage):
    optimizer, name = provider(monkeypatch, apex=True, zero_stage=stage)
    if stage < 3:
        assert name == "NVIDIA apex's fused AdamW"
        assert optimizer.options == {"adam_w_mode": True, "lr": 1e-3, "betas": (0.8, 0.9), "eps": 1e-7}
    else:
        assert name == "torch's fused AdamW"
        assert optimizer.defaults["fused"]


def test_without_apex_or_another_package_of_that_name(monkeypatch):
    optimizer, name = provider(monkeypatch, apex=False)
    assert (name, optimizer.defaults["fused"]) == ("torch's fused AdamW", True)


def test_offload(monkeypatch):
    optimizer, name = provider(monkeypatch, apex=True, offload=True, zero_stage=2)
    assert name == "DeepSpeed's CPU AdamW"
    assert optimizer.options["adamw_mode"]


@pytest.mark.parametrize(
    "words",
    [
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ...",
        "CUDA error: out of memory",  # pinned memory
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "NCCL error in: ProcessGroupNCCL.cpp: unhandled cuda error. Last error: Cuda failure 2 'out of memory'",
    ],
)
def test_out_of_memory_has_many_voices(words):
    assert _is_out_of_memory(RuntimeError(words))
    assert not _is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
