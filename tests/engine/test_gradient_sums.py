"""bf16 gradients of many micro-batches are summed in fp32 and rounded once, at every ZeRO stage."""

import contextlib
from functools import partial

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero.gradient_sums import GradientSums
from amclr_scale.metrics.phases import Phases
from tests.engine.towers import config, local_batch, towers

SIZE, MICRO = 128, 2
CPU = torch.device("cpu")


def gradients(stage: int, precision: str, offload: str) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The averaged gradient of every parameter, and what each backward on this rank had left there."""
    from deepspeed.utils import safe_get_full_grad

    changes = {"execution__zero_stage": stage, "execution__precision": precision, "execution__offload": offload}
    settings = config(SIZE, **changes, optimizer__max_grad_norm=0.0)
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    parameters = list(model.parameters())
    left: list[list[Tensor]] = [[] for _ in parameters]
    for parameter, seen in zip(parameters, left, strict=True):  # before the step's own hooks, which take it away
        parameter.register_post_accumulate_grad_hook(lambda p, seen=seen: seen.append(p.grad.clone()))
    step = TrainStep(
        engine, objectives.create("siglip"), micro_batch_sizes=(MICRO, MICRO), device=CPU, phases=Phases(CPU)
    )
    averaged: list[Tensor] = []

    def look_and_step(plain) -> None:
        averaged.extend(safe_get_full_grad(p).clone() for p in parameters)
        plain()

    engine.step = partial(look_and_step, engine.step)
    step(local_batch(0, SIZE, rank(), world_size()), 0.01)
    assert all(p.grad is None and p.fp32_gradient_sum is None for p in parameters)
    engine.destroy()
    return averaged, left


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "parameters")]
)
@pytest.mark.parametrize("size", [1, 2])
def test_one_rounding_whatever_the_number_of_micro_batches(ranks, size, stage, offload):
    answers = ranks(size, gradients, stage, "bf16", offload)
    sent = [[rounded_sum(seen) for seen in left] for _, left in answers]
    for averaged, _ in answers:
        for index, got in enumerate(averaged):
            mean = torch.stack([each[index] for each in sent]).float().mean(0)  # taken in fp32, kept in bf16
            assert torch.equal(got.bfloat16(), mean.bfloat16())


def rounded_sum(seen: list[Tensor]) -> Tensor:
    assert len(seen) >= SIZE // MICRO // 2
    assert all(gradient.dtype == torch.bfloat16 for gradient in seen)
    exact = torch.stack(seen).double().sum(0)
    in_fp32 = sum(gradient.float() for gradient in seen).bfloat16()
    assert ((in_fp32 - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()
    return in_fp32


def test_sums_in_bf16_would_be_seen(ranks):
    """So that the test above can fail: added in bf16, these gradients are further off than one rounding."""
    ((_, left),) = ranks(1, gradients, 1, "bf16", "none")
    exact, added = [torch.stack(seen).double().sum(0) for seen in left], [sum(seen[1:], seen[0]) for seen in left]
    once = sum(float((e.bfloat16() - e).square().sum()) for e in exact) ** 0.5
    assert sum(float((a - e).square().sum()) for a, e in zip(added, exact, strict=True)) ** 0.5 > 1.5 * once


def test_fp32_is_left_alone():
    model = towers()
    sums = GradientSums(model.parameters())
    with sums:
        model.words.weight.sum().backward()
        assert torch.equal(model.words.weight.grad, torch.ones_like(model.words.weight))


def test_a_failed_step_leaves_no_sums():
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    sums = GradientSums([weight])
    with contextlib.suppress(MemoryError), sums:
        weight.sum().backward()
        raise MemoryError
    assert weight.grad is None
    assert weight.fp32_gradient_sum is None
    weight.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight)), "outside, gradients stay where autograd puts them"


def test_a_sum_too_large_for_fp16_is_infinite():
    weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float16))
    with GradientSums([weight]):
        for _ in range(3):
            (weight * 30000).sum().backward()
    assert weight.grad.isinf()


def test_gradients_that_wait_are_added_like_those_that_do_not(monkeypatch):
    """The way of CUDA, on CPU tensors: which gradients wait is all that differs."""
    drawn = torch.Generator().manual_seed(0)
    shapes = [(3,), (40, 5), (2000,), (7, 7)]

    def summed(waits: bool) -> list[Tensor]:
        parameters = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)) for shape in shapes]
        sums = GradientSums(parameters)
        monkeypatch.setattr(GradientSums, "_may_wait", lambda self, gradient: waits and gradient.numel() < 1000)
        drawn.manual_seed(0)
        with sums:
            for _ in range(50):
                terms = [(p * torch.randn(p.shape, generator=drawn)).sum() for p in parameters]
                torch.stack(terms).sum().backward()
                sums.flush()
            found = [p.fp32_gradient_sum.clone() for p in parameters]
        return found

    monkeypatch.setattr("amclr_scale.engine.zero.gradient_sums.AT_ONCE", 100)  # some are added on the way
    for together, one_by_one in zip(summed(True), summed(False), strict=True):
        assert together.dtype == torch.float32
        assert torch.equal(together, one_by_one)
