"""Every parameter starts where GPU kernels can read 16 bytes at once, in whatever flat buffer ZeRO puts it."""

import logging

import pytest
import torch
from torch import nn

from amclr_scale.config.load import build
from amclr_scale.config.schema import Config
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.build import model_of
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.zero.alignment import misaligned, report_misaligned
from amclr_scale.engine.zero.stage3_init import shape_only
from tests.engine.towers import CPU

FACTORS = {"image_tower": 0.1, "text_tower": 0.5, "heads": 1.0, "temperature": 2.0}
TOWERS = {
    "quickstart": {},
    "vit": {"image": {"name": "timm/vit_tiny_patch16_224"}},
    "resnet50": {"image": {"name": "torchvision/resnet50", "norm": "group"}},
    "distilbert": {"text": {"name": "transformers/distilbert"}},
}


class Vocabulary:
    """What a model needs to know of a tokenizer; no factor of two in its size."""

    vocab_size, pad_id, end_id = 101, 0, 1


def recipe(towers: str, *, stage: int, precision: str, factors: bool, offload: str) -> Config:
    return build(
        {
            "data": {"image_size": 32, "context_length": 8},
            "model": TOWERS[towers],
            "train": {"global_batch_size": 8, "samples": 1000},
            "optimizer": {"lr_factors": FACTORS} if factors else {},
            "execution": {"zero_stage": stage, "precision": precision, "offload": offload},
        },
        world_size(),
    )


def layout(towers: str, device: torch.device = CPU, **how: object) -> tuple[list[str], int]:
    """Misaligned parameters after `deepspeed.initialize`, and how many were looked at."""
    settings = recipe(towers, **{"stage": 1, "precision": "bf16", "factors": False, "offload": "none", **how})
    torch.manual_seed(0)
    with shape_only(settings.execution.zero_stage, rank()):
        model = model_of(settings, Vocabulary(), weights=False)
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=device, world_size=world_size())
    named = list(model.named_parameters())
    found = misaligned(named, world_size())
    engine.destroy()
    return found, len(named)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("towers", ["quickstart", "vit"])
def test_parameters_start_at_multiples_of_16_bytes(ranks, towers, stage):
    """With rates of their own for parts of the model, and without: each at every stage, and with either model."""
    factors = (stage + (towers == "vit")) % 2 == 1
    precision = "bf16" if stage else "fp32"
    ((found, looked_at),) = ranks(1, layout, towers, stage=stage, precision=precision, factors=factors)
    assert looked_at > 50
    assert not found


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("towers", ["resnet50", "distilbert"])
def test_large_towers_too(ranks, towers, world_size):
    for factors in (False, True):
        for found, looked_at in ranks(world_size, layout, towers, stage=3 - world_size, factors=factors):
            assert looked_at > 100
            assert not found


OFFLOADS = {0: ("none",), 1: ("none", "optimizer"), 2: ("none", "optimizer"), 3: ("none", "optimizer", "parameters")}
CASES = [
    {"stage": stage, "offload": offload, "precision": precision, "factors": factors}
    for stage, offloads in OFFLOADS.items()
    for offload in offloads
    for precision in (("fp32",) if stage == 0 else ("fp32", "bf16"))  # bf16 weights need ZeRO's masters
    for factors in (False, True)  # with rates of its own the temperature has a group to itself
]


def misaligned_cases(towers: str) -> dict[str, list[str]]:
    """What is misaligned, by case; nothing in it where all is well."""
    found = {str(case): layout(towers, **case)[0] for case in CASES}
    return {case: names for case, names in found.items() if names}


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_stage_with_and_without_offload_in_both_precisions(ranks, world_size):
    for found in ranks(world_size, misaligned_cases, "quickstart"):
        assert not found


def linear_after(*stages: int) -> list[str]:
    """The module of `torch.nn.functional.linear` after an engine of each stage."""
    modules = []
    for stage in stages:
        layout("quickstart", stage=stage)
        modules.append(torch.nn.functional.linear.__module__)
    return modules


def test_an_engine_at_stage_3_leaves_nothing_to_the_next(ranks):
    """Its linear rounds otherwise in 16 bits: a run after it, in the same process, would give other numbers."""
    ((first, after),) = ranks(1, linear_after, 3, 1)
    assert first.startswith("deepspeed")
    assert after == "torch._C._nn"


class Odd(nn.Module):
    """What ZeRO would lay end to end: a scale of one element, then a matrix."""

    def __init__(self) -> None:
        super().__init__()
        flat = torch.zeros(65, dtype=torch.bfloat16)
        self.scale, self.weight = nn.Parameter(flat[:1]), nn.Parameter(flat[1:].view(8, 8))


def test_the_first_misaligned_parameter_is_named(caplog):
    with caplog.at_level(logging.DEBUG, "amclr_scale.engine.zero.alignment"):
        report_misaligned(Odd(), 1)
    assert "1 parameters do not start at a multiple of 16 bytes, the first is weight" in caplog.text
