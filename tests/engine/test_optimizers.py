"""One weight decay for all; who provides AdamW on a GPU: apex where it is right, DeepSpeed under offload, torch."""

import sys
import typing
from pathlib import Path
from types import ModuleType

import deepspeed.ops.adam
import pytest
import torch
from torch import Tensor

from amclr_scale.config.optimizers import RULES
from amclr_scale.config.schema import Optimizer
from amclr_scale.engine.optimizers import build_optimizer, set_learning_rate
from amclr_scale.engine.step import _is_out_of_memory
from amclr_scale.engine.zero.layerwise import LAMB, LARS

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
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "lr_factor": 1.0, "weight_decay": 0.1, "layerwise": True}]
    return build_optimizer(Optimizer(betas=(0.8, 0.9), eps=1e-7), groups, CUDA, **where)


NAMES = list(RULES)
FACTORS = {"adamp": 0.1}  # its own rule, of weights that its gradients are orthogonal to


def weights_after(
    name: str, decay: float, gradients: list[Tensor], layerwise: bool = True, **options: typing.Any
) -> Tensor:
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4))
    group = {"params": [weight], "lr_factor": 0.5, "weight_decay": decay, "layerwise": layerwise}
    optimizer, _ = build_optimizer(Optimizer(name=name, **options), [group], torch.device("cpu"))
    for gradient in gradients:
        set_learning_rate(optimizer.param_groups, 0.02)
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_is_kept(name):
    """Beside each parameter, by what the optimizer holds after a step; and what it does not read changes nothing."""
    for change in ({}, {"momentum": 0.0}):
        options = Optimizer(name=name, **change)
        weight = torch.nn.Parameter(torch.ones(64, 64))
        group = {"params": [weight], "lr_factor": 1.0, "weight_decay": 0.1, "layerwise": True}
        optimizer, _ = build_optimizer(options, [group], torch.device("cpu"))
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        kept = [x for x in optimizer.state[weight].values() if isinstance(x, Tensor) and x.shape == weight.shape]
        assert len(kept) == RULES[name].moments(options)


@pytest.mark.parametrize("key", ["betas", "eps", "momentum", "nesterov"])
@pytest.mark.parametrize("name", NAMES)
def test_the_table_says_what_is_read(name, key):
    other = {"betas": (0.5, 0.6), "eps": 1.0, "momentum": 0.3, "nesterov": False}[key]
    gradients = [torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4) * n for n in (1.0, -0.2, 0.5) * 3]
    same = torch.equal(weights_after(name, 0.1, gradients), weights_after(name, 0.1, gradients, **{key: other}))
    assert same == (key not in RULES[name].keys)


def test_the_documentation_has_the_table():
    page = (Path(__file__).parents[2] / "docs" / "engine.md").read_text()
    for name, rule in RULES.items():
        source = f"`{rule.source}`" if rule.source.endswith(".py") else rule.source
        stages = ", ".join(map(str, rule.stages)) + (", by layers" if rule.layerwise else "")
        cells = [name, source, ", ".join(rule.keys), str(rule.moments(Optimizer(name=name))),
                 "yes" if rule.offloadable else "no", stages]  # fmt: skip
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize("layerwise", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_one_weight_decay_for_all_rules(name, layerwise):
    """Without a gradient a weight shrinks by lr x factor x decay in every step, and nothing remembers it."""
    start = weights_after(name, 0.1, [])
    after = weights_after(name, 0.1, [torch.zeros_like(start)] * 50, layerwise)
    torch.testing.assert_close(after, start * (1 - 0.02 * 0.5 * 0.1 * FACTORS.get(name, 1.0)) ** 50)


@pytest.mark.parametrize("size", [1e-30, 1e-22, 1e-3])
@pytest.mark.parametrize("rule", [LAMB, LARS])
def test_layers_with_hardly_any_gradient_stay_finite(rule, size):
    """|w|^2 / |u|^2 is beyond float32 where |u|^2 is below its normal numbers."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    options = {"betas": (0.9, 0.999), "eps": 1e-8} if rule is LAMB else {"momentum": 0.9}
    optimizer = rule([weight], lr=0.01, weight_decay=0.1, **options)
    for seed in range(3):
        weight.grad = size * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
    assert weight.isfinite().all()
    assert (weight - 1).norm() < 4 * 3 * 0.02


@pytest.mark.parametrize("name", ["lamb", "lars"])
def test_layers_are_rescaled_whether_or_not_weights_decay(name):
    """With gradients of length 1, a step's length follows that of the weights, decay or not."""
    gradient = torch.full((3, 4), 12**-0.5, dtype=torch.float64)
    start = weights_after(name, 0.0, [])
    for decay in (0.0, 1e-9):
        step = weights_after(name, decay, [gradient]) - start
        trust = {"lamb": 1.0, "lars": 1e-3}[name]
        torch.testing.assert_close(step.norm(), 0.01 * trust * start.norm(), rtol=1e-6, atol=0)


def test_a_layer_of_zeros_learns():
    """Its trust ratio is 1, as that of a layer without gradient is: |w| / |u| would leave it at zero for ever."""
    for rule, step in ((LAMB, 0.1), (LARS, 0.1 * 3.0)):
        weight = torch.nn.Parameter(torch.zeros(2, 3))
        weight.grad = torch.full((2, 3), 3.0)
        options = {"betas": (0.9, 0.98), "eps": 0.0} if rule is LAMB else {"momentum": 0.0}
        rule([{"params": [weight]}], lr=0.1, **options).step()
        torch.testing.assert_close(weight.detach(), torch.full((2, 3), -step))


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
