"""fp16 under the gradient cache: the loss is scaled, a step that overflows is skipped, and what is learned is fp32's.

torch computes half precision on a CPU too, in software; DeepSpeed's question about the hardware is answered for it.
"""

from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.config.schema import Momentum
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import NonFiniteError, TrainStep
from amclr_scale.engine.teacher import Teacher
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Embeddings, Loss
from tests.engine.towers import config, local_batch, plain_run, towers

SIZE = 16
CPU = torch.device("cpu")


def half_run(
    stage: int, power: int | None, steps: int, poison: int | None = None, **options: Any
) -> tuple[dict[str, Tensor], list[Any]]:
    """Train; returns the fp32 weights, and per step what it left, or what was raised.

    Args:
        power: the scale begins with 2**power; None: it is fixed.
        options: name and options of the objective, clip if there are none.

    Returns:
        Of a step: was it applied, the loss scale, a weight, and the objective's state with the teacher's weight.
    """
    tree = config(SIZE, execution__zero_stage=stage, execution__precision="fp16", optimizer__lr=0.002)
    scale = {"loss_scale": 128} if power is None else {"initial_scale_power": power, "hysteresis": 1}
    settings = tree.model_copy(update={"deepspeed": {"fp16": scale}})
    model = towers()
    accelerator = type(deepspeed.accelerator.get_accelerator())
    with mock.patch.object(accelerator, "is_fp16_supported", return_value=True):
        engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    made = objectives.create(**({"name": "clip"} | options))

    def objective(embeddings: Embeddings) -> Loss:
        loss = made(embeddings)
        return Loss(loss.value * float("nan"), loss.metrics) if len(told) == poison and rank() == 0 else loss

    teacher = Teacher(Momentum(decay=0.5), engine, precision="fp16", total_steps=steps, lends=(), device=CPU)
    step = TrainStep(
        engine, objective, micro_batch_sizes=(3, 3), device=CPU, phases=Phases(CPU), kept=1, teacher=teacher
    )
    told: list[Any] = []
    for n in range(steps):
        try:
            step(local_batch(n, SIZE, rank(), world_size()), 0.002)
        except NonFiniteError as error:
            told.append(str(error))
            break
        state = {name: value.clone() for name, value in made.state_dict().items()}
        state["teacher"] = teacher.weights.whole()["words.weight"]
        told.append(
            (engine.was_step_applied(), float(engine.optimizer.cur_scale), full_fp32(model.words.weight), state)
        )
    weights = {name: full_fp32(p) for name, p in model.named_parameters()}
    engine.destroy()
    return weights, told


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_follows_fp32(ranks, stage):
    want, _ = plain_run(config(SIZE, optimizer__lr=0.002), 5)
    for weights, told in ranks(2, half_run, stage, 8, 5):
        assert all(applied for applied, *_ in told)
        for name, value in want.items():
            assert (weights[name] - value).norm() < 0.02 * value.norm() + 0.01, name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_is_skipped_on_every_rank_and_the_scale_falls(ranks, stage):
    for _, told in ranks(2, half_run, stage, 24, 16):
        applied = [one for one, *_ in told]
        assert not applied[0], "a scale of 2**24 overflows in half precision"
        assert applied[-1], "and training goes on with a smaller one"
        scales = [scale for _, scale, *_ in told]
        assert scales[-1] < scales[0]
        first = applied.index(True)
        skipped = [weight for _, _, weight, _ in told[:first]]
        assert all(torch.equal(weight, skipped[0]) for weight in skipped)


STATEFUL = (
    {"name": "isogclr", "num_samples": 40, "sample_state": "sharded"},
    {"name": "fastclip", "version": "v2", "num_samples": 40, "sample_state": "replicated"},
    {"name": "onlineclr", "temperature": 0.05},
)


@pytest.mark.parametrize("options", STATEFUL, ids=lambda options: options["name"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_skipped_step_leaves_no_trace_in_the_objectives_state_and_the_teacher(ranks, stage, options):
    """Embeddings and loss are finite: it is the scaled gradient that overflows."""
    for _, told in ranks(2, half_run, stage, 22, 12, **options):
        applied, states = [one for one, *_ in told], [state for *_, state in told]
        assert not applied[0]
        assert any(applied)
        fresh = objectives.create(**options).state_dict()
        assert all(torch.equal(states[0][name], value) for name, value in fresh.items())
        for was_applied, before, after in zip(applied[1:], states, states[1:], strict=False):
            moved = [name for name, value in after.items() if not torch.equal(value, before[name])]
            assert moved == (list(after) if was_applied else [])


@pytest.mark.parametrize("stage", [1, 3])
def test_every_scale_down_to_1_is_tried(ranks, stage):
    for _, told in ranks(2, half_run, stage, 1, 3, 0):
        assert [(applied, scale) for applied, scale, *_ in told] == [(False, 1.0), (True, 1.0), (True, 1.0)]


@pytest.mark.parametrize("power", [0, None])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_loss_that_no_scale_mends_ends_the_run(ranks, stage, power):
    for _, told in ranks(2, half_run, stage, power, 4, 0):
        assert isinstance(told[-1], str)
        assert "the gradient is not finite" in told[-1]
