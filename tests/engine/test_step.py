"""A step through DeepSpeed and the gradient cache: offload, precisions, dropout, recomputation, and what stops it."""

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.checkpoint.pieces import flats
from amclr_scale.config.schema import Config, Execution
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.engine.deepspeed_setup import build_engine, prepare_towers
from amclr_scale.engine.step import NonFiniteError, OutOfMemoryError, TrainStep
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.errors import UserError
from amclr_scale.metrics.phases import Phases
from amclr_scale.types import Embeddings, Loss
from tests.engine.towers import (
    FROZEN_WITH,
    config,
    differences,
    engine_run,
    local_batch,
    plain_run,
    real_run,
    towers,
)

SIZE, STEPS = 16, 5
CPU = torch.device("cpu")


def assert_same(ranks: Any, changes: dict[str, Any], sizes: tuple[int, int], kept: int) -> None:
    settings = config(SIZE, **changes)
    errors = differences(ranks(2, engine_run, settings, sizes, kept, STEPS), plain_run(settings, STEPS))
    for name, error in errors.items():
        assert error < (1e-5 if name == "loss" else 1e-6), f"{name}: {error:.1e}"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_texts_may_be_encoded_all_at_once_beside_images_in_parts(ranks, stage):
    assert_same(ranks, {"execution__zero_stage": stage, "optimizer__eps": 1e-4}, (2, 8), 0)


def _silent(settings: Config) -> Any:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a message to itself")

    plain, DeepSpeedEngine.buffered_allreduce_fallback = DeepSpeedEngine.buffered_allreduce_fallback, refuse
    try:
        return engine_run(settings, (4, 4), 1, STEPS)
    finally:
        DeepSpeedEngine.buffered_allreduce_fallback = plain


def test_a_rank_alone_sends_no_gradients(ranks):
    settings = config(SIZE, optimizer__eps=1e-4)
    for name, error in differences(ranks(1, _silent, settings), plain_run(settings, STEPS)).items():
        assert error < (1e-5 if name == "loss" else 1e-6), f"{name}: {error:.1e}"


def _scale_that_is_left_alone(stage: int) -> list[float]:
    """The logarithm of the learned scale after each step; nothing depends on it from the fourth one on."""
    settings, model = config(8, execution__zero_stage=stage, optimizer__eps=1e-4), towers()
    prepare_towers(model, settings.execution)
    no_decay = model.no_weight_decay()
    engine, _ = build_engine(settings, model, no_decay=no_decay, device=CPU, world_size=world_size())
    objective, found = objectives.create("m3col", temperature=None, soft_epoch=1.0), []
    step = TrainStep(engine, objective, micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
    for n in range(6):
        objective.set_epoch(n / 3)
        step(local_batch(n, 8, rank(), world_size()), 0.02)
        found.append(model.logit_scale.item())
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [0, 1])
def test_moments_of_a_parameter_that_nothing_depends_on_go_on(ranks, stage):
    """Alike on one rank and on several."""
    (alone,) = ranks(1, _scale_that_is_left_alone, stage)
    two = ranks(2, _scale_that_is_left_alone, stage)
    assert len(set(alone)) == 6
    assert two == [pytest.approx(alone, rel=1e-6)] * 2


FROZEN = [("image_tower",), ("temperature", "text_tower"), ("heads", "image_tower", "temperature")]


@pytest.mark.parametrize("frozen", FROZEN, ids=",".join)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_factor_of_zero_freezes(ranks, stage, frozen):
    """No gradient, no part of the norm that is clipped, no moments: as if the parameters were constants.

    In micro-batches of both towers, and of one tower alone: each at every stage, and with all that is frozen.
    """
    sizes = ((3, 3), (2, 8))[(stage + FROZEN.index(frozen)) % 2]
    changes = {"zero_stage": stage, "recompute_image": "full"}
    settings = config(
        SIZE, optimizer__lr_factors=dict.fromkeys(frozen, 0.0), optimizer__eps=1e-4, optimizer__max_grad_norm=0.05,
        **{f"execution__{key}": value for key, value in changes.items()},
    )  # fmt: skip
    found = ranks(2, frozen_run, settings, sizes)
    for name, error in differences([run for run, _ in found], plain_run(settings, STEPS)).items():
        assert error < (1e-5 if name == "loss" else 1e-6), f"{name}: {error:.1e}"
    names = {name for name, _ in towers().named_parameters()}
    parts = tuple(part for key in frozen for part in FROZEN_WITH[key])
    for _, stepped in found:
        assert stepped == {name for name in names if not name.startswith(parts)}


def frozen_run(settings: Config, sizes: tuple[int, int]) -> tuple[Any, set[str]]:
    """As `engine_run`, and of which parameters the optimizers of all ranks hold pieces."""
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    mine = {part.name for flat in flats(engine) for part in flat.parts}
    every: list[set[str]] = [mine] * world_size()
    torch.distributed.all_gather_object(every, mine)
    engine.destroy()
    return engine_run(settings, sizes, 0, STEPS), set.union(*every)


def test_everything_frozen_is_refused():
    settings, model = config(SIZE, optimizer__lr_factors={"image_tower": 0.0}), torch.nn.Module()
    model.image_tower = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"optimizer.lr_factors: .* nothing is trained"):
        build_engine(settings, model, no_decay=set(), device=CPU, world_size=1)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_names_step_rank_and_ids_and_touches_nothing(ranks, stage):
    """Neither a weight nor the state of a sample."""
    for message, moved in ranks(2, poisoned_run, stage):
        assert "step 2" in message
        assert "rank 0: loss" in message
        assert "its features are finite" in message or "ids" in message
        assert "rank 1: loss nan; ids with non-finite features or gradients: [10" in message
        assert moved == 0


def poisoned_run(stage: int) -> tuple[str, float]:
    settings = config(SIZE, execution__zero_stage=stage)
    model = towers()
    engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    poisoned: list[int] = []
    sogclr = objectives.create("sogclr", num_samples=40)

    def objective(embeddings: Embeddings) -> Loss:
        image = embeddings.image
        if poisoned and rank() == 1:
            image = image * torch.ones(len(image), 1).index_fill(0, torch.tensor([0]), torch.nan)
        return sogclr(dataclasses.replace(embeddings, image=image))

    step = TrainStep(engine, objective, micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
    for n in range(2):
        step(local_batch(n, SIZE, rank(), world_size()), 0.01)

    def everything() -> dict[str, Tensor]:
        weights = {name: full_fp32(p) for name, p in model.named_parameters()}
        return weights | {name: state.clone().nan_to_num(neginf=-1e3) for name, state in sogclr.state_dict().items()}

    before = everything()
    poisoned.append(1)
    try:
        step(local_batch(2, SIZE, rank(), world_size()), 0.01)
    except NonFiniteError as error:
        after = everything()
        engine.destroy()
        return str(error), max(float((after[name] - before[name]).abs().max()) for name in before)
    raise AssertionError("the step went through")


def test_dropout_is_replayed_bit_for_bit(ranks):
    (kept, _), (cached, _), (half, _) = (
        ranks(1, engine_run, config(SIZE), (4, 4), kept, 3, dropout=0.3)[0] for kept in (4, 0, 2)
    )
    for name, weight in kept.items():
        assert torch.equal(weight, cached[name])
        assert torch.equal(weight, half[name])


@pytest.mark.parametrize(
    ("stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_offload_changes_nothing(ranks, stage, offload, name):
    changes = {
        "execution__zero_stage": stage,
        "execution__offload": offload,
        "optimizer__name": name,
        "optimizer__lr": 0.01,
        "optimizer__eps": 1e-4,
    }
    assert_same(ranks, changes, (3, 3), 1)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(ranks, stage):
    changes = {"execution__zero_stage": stage, "execution__precision": "bf16", "optimizer__lr": 0.002}
    want = plain_run(config(SIZE, optimizer__lr=0.002), STEPS)
    for weights, _ in ranks(2, engine_run, config(SIZE, **changes), (3, 3), 1, STEPS):
        for name, value in want[0].items():
            assert (weights[name] - value).norm() < 0.03 * value.norm() + 0.01, name


def test_out_of_memory_says_which_key_to_turn(ranks):
    encoding, objective = ranks(1, starved_run, "encoding")[0], ranks(1, starved_run, "objective")[0]
    assert "execution.micro_batch_size: 2 instead of 4" in encoding
    assert "execution.similarity.chunk" in objective
    assert "step 0, phase objective, 16 samples" in objective


def starved_run(where: str) -> str:
    model = towers()
    engine, _ = build_engine(config(SIZE), model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())

    def objective(embeddings: Embeddings) -> Loss:
        torch.empty(2**50)
        raise AssertionError("a pebibyte was there")

    if where == "encoding":
        model.image_tower.register_forward_hook(lambda *_: torch.empty(2**50))
    step = TrainStep(engine, objective, micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
    try:
        step(local_batch(0, SIZE, rank(), world_size()), 0.01)
    except OutOfMemoryError as error:
        engine.destroy()
        return str(error)
    raise AssertionError("the step went through")


def recomputed_run(stage: int, recomputation: str | int, dropout: float, micro: int = 3) -> list[Tensor]:
    def prepare(model: DualEncoder) -> None:
        prepare_towers(model, Execution(recompute_image=recomputation, recompute_text=recomputation))

    return real_run(stage, prepare, layers=2, dropout=dropout, micro=micro, kept=1)


@pytest.fixture(scope="module")
def recomputed(ranks):
    """`recomputed_run` on two ranks, once for each of its arguments."""
    return cache(lambda *args: ranks(2, recomputed_run, *args))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_recomputation_under_the_cache_changes_nothing(recomputed, stage):
    plain, full, every_second = (recomputed(stage, choice, 0.2) for choice in ("none", "full", 2))
    for want, a, b in zip(plain, full, every_second, strict=True):
        for x, y, z in zip(want, a, b, strict=True):
            assert torch.equal(x, y)
            assert torch.equal(x, z)


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.parametrize("recomputation", ["full", 2])
def test_recomputation_of_a_whole_share_at_once(recomputed, stage, recomputation):
    """Without the cache nothing but backward runs a block again; stage 3 follows the order of modules over steps."""
    plain, again = (recomputed(stage, choice, 0.2, 8) for choice in ("none", recomputation))
    for want, got in zip(plain, again, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(want, got, strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_stages_agree_on_real_towers(recomputed, stage, dropout):
    """Built on the host and cut up at stage 3: the same weights to begin with, and the same masks."""
    for want, got in zip(recomputed(0, "none", dropout), recomputed(stage, 2, dropout), strict=True):
        for x, y in zip(want, got, strict=True):
            assert (x - y).norm() <= 1e-6 * x.norm() + 1e-7
