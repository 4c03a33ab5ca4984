"""One multi-tensor norm tells what DeepSpeed's loops tell: the norm, and whether a step must be skipped."""

import math

import pytest
import torch
from deepspeed.runtime.utils import has_inf_or_nan

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import NonFiniteError, TrainStep
from amclr_scale.engine.zero.gradient_norm import square_sum
from amclr_scale.metrics.phases import Phases
from tests.engine.towers import config, local_batch, towers

SIZE = 16
CPU = torch.device("cpu")


def test_it_is_the_norm_of_everything_laid_end_to_end():
    drawn = [torch.randn(n, dtype=dtype) for n in (1, 7, 640) for dtype in (torch.float32, torch.bfloat16)]
    whole = torch.cat([x.double() for x in drawn])
    assert math.isclose(float(square_sum([*drawn, torch.empty(0)])), float(whole.square().sum()), rel_tol=1e-12)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_entry_that_is_not_finite_is_never_missed(bad, dtype):
    drawn = [torch.full((1000,), 1e4, dtype=dtype) for _ in range(3)]
    assert square_sum(drawn).isfinite()  # also where float16 squares would overflow
    drawn[1][500] = bad
    assert not square_sum(drawn).isfinite()
    assert bool(has_inf_or_nan(drawn[1]))


def both_of_groups(precision: str) -> tuple[list[float], list[float], bool]:
    """At stage 3, of one step: our norm of each group, DeepSpeed's, and whether DeepSpeed saw an overflow."""
    settings = config(SIZE, execution__zero_stage=3, execution__precision=precision)
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    zero, found = engine.optimizer, []
    ours = zero._get_norm_groups

    def looked_at() -> list[torch.Tensor]:
        theirs = type(zero)._get_norm_groups(zero)
        overflow = type(zero).has_overflow(zero)
        norms = ours()
        found.append(([float(n) for n in norms], [float(n) for n in theirs], overflow))
        zero.averaged_gradients[0][0][0] = math.nan
        assert float(ours()[0]) == float(type(zero)._get_norm_groups(zero)[0]) == -1
        assert type(zero).has_overflow(zero)
        return ours()

    zero._get_norm_groups = looked_at
    step = TrainStep(engine, objectives.create("clip"), micro_batch_sizes=(3, 3), device=CPU, phases=Phases(CPU))
    with pytest.raises(NonFiniteError):
        step(local_batch(0, SIZE, rank(), world_size()), 0.002)
    engine.destroy()
    return found[0]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("W", [1, 2])
def test_at_stage_3_it_is_deepspeeds_of_every_group(ranks, W, precision):
    for ours, theirs, overflow in ranks(W, both_of_groups, precision):
        assert len(ours) > 1
        assert ours == theirs  # to the bit
        assert not overflow


def both_norms(stage: int, precision: str) -> tuple[float, float, bool]:
    """Of one step: our norm, DeepSpeed's own of the same gradients, and whether DeepSpeed saw an overflow."""
    settings = config(SIZE, execution__zero_stage=stage, execution__precision=precision)
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    assert not engine.tput_timer.config.enabled  # DeepSpeed's own waits for the device before every forward
    zero, found = engine.optimizer, []
    ours = zero.scaled_global_norm

    def looked_at() -> torch.Tensor:
        theirs = type(zero).scaled_global_norm(zero)
        type(zero).check_overflow(zero, zero.partition_gradients)
        found.append((float(ours()), float(theirs), bool(zero.overflow)))
        zero.overflow = False
        return ours()

    zero.scaled_global_norm = looked_at
    step = TrainStep(engine, objectives.create("clip"), micro_batch_sizes=(3, 3), device=CPU, phases=Phases(CPU))
    step(local_batch(0, SIZE, rank(), world_size()), 0.002)
    return found[0]


@pytest.mark.parametrize(("stage", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_it_is_deepspeeds_norm(ranks, stage, precision):
    for ours, theirs, overflow in ranks(2, both_norms, stage, precision):
        assert ours > 0
        assert math.isclose(ours, theirs, rel_tol=3e-7)
        assert not overflow
