"""Ranks that run modules in different orders at stage 3 are told so, although no step waits to compare the orders."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine import deepspeed_setup
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.engine.zero import module_order
from amclr_scale.engine.zero.master_weights import full_fp32
from amclr_scale.engine.zero.module_order import ModuleOrderError, ModuleOrders, note_orders
from amclr_scale.metrics.phases import Phases
from amclr_scale.planner.messages import MessageCounter
from tests.engine.towers import CPU, Block, config, local_batch, towers

SIZE = 16
# Every module gathers its own parameters and nothing ahead: ranks in different orders send messages of one size.
ALONE = {
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0,
}


class TwoBlocks(torch.nn.Module):
    """Two blocks of one size, in an order that may change."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.turned = Block(0.0), Block(0.0), False

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.second, self.first) if self.turned else (self.first, self.second)
        out: Tensor = second(first(x))
        return out


def run(
    turned_from: int, kept: int, *, turned_in: str = "both", compared: str = "with the norm", offload: str = "none",
    stage: int = 3,
) -> Any:  # fmt: skip
    """Train for four steps of two micro-batches; rank 1 runs the blocks of its text tower in the other order.

    Args:
        turned_from: the step from which it does.
        turned_in: "both" passes of it, or the "last" backward alone.
        compared: what was noted: "with the norm" as always, "at the end" of the step, or "never".

    Returns:
        What was raised, in words, and in which step; or the losses.
    """
    settings = config(
        SIZE,
        execution__zero_stage=stage,
        execution__offload=offload,
        optimizer__name="sgd",
        optimizer__max_grad_norm=0.0,
    ).model_copy(update={"deepspeed": {"zero_optimization": ALONE}})
    model: Any = towers()
    model.text_tower = blocks = TwoBlocks()
    engine, _ = build_engine(settings, model, no_decay=set(), device=CPU, world_size=world_size())
    zero = engine.optimizer
    if compared == "never":
        engine.module_orders.check = lambda numbers: None
    elif compared == "at the end":
        zero._get_norm_groups = type(zero)._get_norm_groups.__get__(zero)  # DeepSpeed's
    share = SIZE // world_size() // 2
    step = TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=(share, share), device=CPU, phases=Phases(CPU), kept=kept
    )
    calls, losses = 0, []

    def turn(*_: object) -> None:
        nonlocal calls
        per_step = 4 - kept
        wanted = turned_in == "both" or calls % per_step == per_step - 1
        blocks.turned = rank() == 1 and calls // per_step >= turned_from and wanted
        calls += 1

    model.register_forward_pre_hook(turn)
    try:
        for n in range(4):
            before = [p.ds_tensor.clone() for p in model.parameters() if stage == 3]
            losses.append(float(step(local_batch(n, SIZE, rank(), world_size()), 0.01).loss.value.detach()))
    except ModuleOrderError as error:
        unchanged = all(torch.equal(a, p.ds_tensor) for a, p in zip(before, model.parameters(), strict=True))
        return str(error), n, unchanged
    finally:
        engine.destroy()
    return losses


@pytest.mark.parametrize(("turned_from", "kept"), [(0, 0), (0, 1), (3, 0), (3, 1), (3, 2)])
def test_another_order_is_told_on_all_ranks_before_weights_change(ranks, turned_from, kept):
    first, second = ranks(2, run, turned_from, kept)
    assert first == second
    message, step, unchanged = first
    assert step == turned_from
    assert unchanged
    place = message.split(": ")[1]
    assert "was text_tower.first on rank 0 and text_tower.second on rank 1" in place
    assert "of call 1 was" in place  # the first of this step


def test_the_last_pass_of_a_step_counts_too(ranks):
    """DeepSpeed would look at it when the next step begins."""
    message, step, unchanged = ranks(2, run, 3, 0, turned_in="last")[0]
    assert (step, unchanged) == (3, True)
    assert "of call 4 was text_tower.first on rank 0 and text_tower.second on rank 1" in message


def test_a_step_whose_norm_nobody_takes_compares_at_its_end(ranks):
    message, step, unchanged = ranks(2, run, 3, 1, compared="at the end")[0]
    assert (step, unchanged) == (3, False)
    assert "of call 1 was text_tower.first on rank 0" in message


def test_without_the_comparison_nobody_would_know(ranks):
    """At stage 0, where nothing is gathered, each rank computes with its own weights, in its own order."""
    gathered, own = (ranks(2, run, 0, 1, compared=when, stage=n) for when, n in (("never", 3), ("with the norm", 0)))
    for wrong, right in zip(gathered, own, strict=True):
        assert len(wrong) == len(right) == 4  # no error, and no rank that waits for another
        assert abs(wrong[0] - right[0]) > 1e-3


# micro-batches of pictures, of captions, kept graphs
CUT = [(1, 1, 1), (2, 2, 1), (8, 8, 0), (8, 8, 1), (8, 8, 3), (8, 4, 1)]
STEPS = 4  # what is counted: orders come back after two


def messages(images: int, texts: int, kept: int, *, ours: bool) -> tuple[dict[str, float], list[Tensor], list[float]]:
    """Per step, from the third on, messages of all ranks to all; then the weights, and the norms of all steps.

    Args:
        ours: orders and norms as they are here, not as DeepSpeed has them.
    """
    settings = config(SIZE, execution__zero_stage=3)
    model: Any = towers()
    with ExitStack() as stack:
        for name in () if ours else ("note_orders", "fuse_norm"):
            stack.enter_context(mock.patch.object(deepspeed_setup, name, return_value=None))
        engine, _ = build_engine(settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size())
    share = SIZE // world_size()
    sizes = share // images, share // texts
    step = TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=sizes, device=CPU, phases=Phases(CPU), kept=kept
    )
    norms = [step(local_batch(n, SIZE, rank(), world_size()), 0.01).grad_norm for n in range(2)]
    with MessageCounter() as counter:
        norms += [step(local_batch(2 + n, SIZE, rank(), world_size()), 0.01).grad_norm for n in range(STEPS)]
    weights = [full_fp32(p) for p in model.parameters()]
    engine.destroy()
    found = counter.messages.by_collective()
    return {name: found[name].calls / STEPS for name in ("broadcast", "all_reduce", "all_gather")}, weights, norms


@pytest.mark.parametrize("cut", CUT, ids=str)
def test_no_message_for_any_call_of_the_model_and_the_same_weights_to_the_bit(ranks, cut):
    """DeepSpeed waits for each of its broadcasts but one, that of the scale."""
    now, weights, norms = ranks(2, messages, *cut, ours=True)[0]
    before, same, as_before = ranks(2, messages, *cut, ours=False)[0]
    print(*cut, "before", before, "now", now)  # pytest -s
    assert now["broadcast"] == 1
    assert now["broadcast"] <= before["broadcast"]
    assert now["all_reduce"] == 1 < before["all_reduce"]
    assert now["all_gather"] == before["all_gather"] + 1
    assert norms == as_before
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))


def quiet(micro_batches: int) -> tuple[bool, int, int]:
    """Whether DeepSpeed's functions were found, and how often it compares in steps, and in two calls beside them."""
    from deepspeed.runtime.zero import partitioned_param_coordinator as namespace

    settings = config(SIZE, execution__zero_stage=3)
    model: Any = towers()
    engine, _ = build_engine(settings, model, no_decay=set(), device=CPU, world_size=world_size())
    size = SIZE // micro_batches
    step = TrainStep(engine, objectives.create("clip"), micro_batch_sizes=(size, size), device=CPU, phases=Phases(CPU))
    theirs, asked = getattr(namespace, module_order.COMPARES), []

    def compared(ints: list[int]) -> None:
        asked.append(len(ints))
        theirs(ints)

    setattr(namespace, module_order.COMPARES, compared)
    try:
        for n in range(4):
            step(local_batch(n, SIZE, 0, 1), 0.01)
        in_steps = len(asked)
        engine.eval()
        batch = local_batch(0, SIZE, 0, 1)
        for views in ((batch.images, ()), (batch.images, batch.texts)):
            with torch.no_grad():
                engine(*views)
    finally:
        setattr(namespace, module_order.COMPARES, theirs)
        engine.destroy()
    return isinstance(engine.module_orders, ModuleOrders), in_steps, len(asked) - in_steps


def test_this_deepspeeds_functions_are_found_and_do_not_compare_in_steps(ranks):
    ((found, in_steps, beside),) = ranks(1, quiet, 4)
    assert found
    assert in_steps == 0
    assert beside > 0


def test_a_deepspeed_that_compares_in_another_way_is_left_alone_and_it_is_said(caplog):
    elsewhere = SimpleNamespace(get_param_coordinator=lambda: SimpleNamespace(reset_step=None))
    for optimizer in (None, SimpleNamespace(), SimpleNamespace(parameter_offload=elsewhere)):
        caplog.clear()
        with caplog.at_level("DEBUG", module_order.log.name):
            assert note_orders(SimpleNamespace(optimizer=optimizer)) is None
        assert "compares orders of modules in a way that is not known here" in caplog.text


def offloaded() -> Any:
    """As above where DeepSpeed takes the norm itself."""
    return run(3, 1, offload="optimizer")


def test_under_offload_it_is_compared_before_weights_change_too(ranks):
    message, step, unchanged = ranks(2, offloaded)[0]
    assert (step, unchanged) == (3, True)
    assert "text_tower.first on rank 0" in message
