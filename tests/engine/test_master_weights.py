"""A clamp of the learned scale holds in the module and in the optimizer's master copy, at every stage and precision."""

import math

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.master_weights import clamp_, full_fp32
from amclr_scale.metrics.phases import Phases
from tests.engine.towers import config, local_batch, towers

SIZE = 16
CPU = torch.device("cpu")


def clamped_run(stage: int, precision: str, low: float, high: float) -> list[tuple[float, float]]:
    settings = config(SIZE, execution__zero_stage=stage, execution__precision=precision)
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    step = TrainStep(engine, objectives.create("clip"), micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
    seen = []
    for n in range(4):
        report = step(local_batch(n, SIZE, rank(), world_size()), 0.01)
        if n:  # the first step ran before the first clamp
            seen.append((math.log(report.logit_scale), float(full_fp32(model.logit_scale))))
        clamp_(model.logit_scale, low, high)
    engine.destroy()
    return seen


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]
)
def test_a_clamp_is_not_undone_by_the_next_step(ranks, stage, precision):
    low, high = 2.0, 2.25  # the scale starts at 2.66: without the clamp it would stay above
    for seen in ranks(2, clamped_run, stage, precision, low, high):
        for used, master_after_the_step in seen:
            assert low - 0.01 <= used <= high + 0.01  # bf16 has three digits
            assert abs(master_after_the_step - used) < 0.05  # one step from the bound, not from 2.66
