"""What `auto` comes to fits the least free memory of all ranks, is the same everywhere, and changes no number."""

import pytest
import torch

from amclr_scale import objectives
from amclr_scale.config.schema import Config
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.step import TrainStep
from amclr_scale.memory.account import account
from amclr_scale.metrics.phases import Phases
from amclr_scale.planner import auto_execution
from amclr_scale.planner.auto_execution import MARGIN, AutoExecution, free_memory
from amclr_scale.planner.settings import changed, with_batch
from amclr_scale.types import Batch
from tests.planner.test_search import MIB, small
from tests.planner.test_traffic import model_of

CPU = torch.device("cpu")


def peak(config: Config, kept: int) -> int:
    wanted = changed(config, kept_micro_batches=kept)
    return account(wanted, world_size=1, num_samples=10_000, device="cpu").peak_bytes


@pytest.mark.parametrize("wanted", [0, 5, 16])
def test_as_many_graphs_are_kept_as_the_fullest_rank_has_room_for(monkeypatch, wanted):
    config = with_batch(small(micro_batch_size=16, kept_micro_batches="auto"), 256)
    least = round((peak(config, wanted) + 1) / MARGIN) + 1
    monkeypatch.setattr(auto_execution, "gather_numbers", lambda numbers, ranks: [[10**12], [least], [10**11]])
    settled, words = AutoExecution(config, RankInfo(), 10_000).resolve_auto(CPU)
    assert settled.execution.kept_micro_batches == wanted
    assert make_plan(settled, 10_000, 1).kept == wanted
    assert f"auto -> {wanted} of 16" in "\n".join(words)


@pytest.mark.slow
def test_auto_settles_every_key_and_keeps_what_was_given(monkeypatch):
    monkeypatch.setattr(auto_execution, "free_memory", lambda device, ranks_here: 200 * MIB)
    config = with_batch(small(auto=True, micro_batch_size=32, kept_micro_batches="auto"), 512)
    settled, words = AutoExecution(config, RankInfo(), 10_000).resolve_auto(CPU)
    execution = settled.execution
    assert not execution.auto
    assert execution.micro_batch_size == 32
    assert isinstance(execution.kept_micro_batches, int)
    assert "given, so kept: micro_batch_size" in words[-1]
    assert account(settled, world_size=1, num_samples=10_000, device="cpu").peak_bytes <= MARGIN * 200 * MIB


def test_what_is_settled_already_is_left_alone():
    config = small(micro_batch_size=32)
    assert AutoExecution(config, RankInfo(), 10_000).resolve_auto(CPU) == (config, [])


def test_free_memory_is_shared_by_the_ranks_of_a_host():
    assert 0 < free_memory(CPU, 4) < free_memory(CPU, 1)


def losses(config: Config) -> list[float]:
    """Of three steps on one rank."""
    model = model_of(config)
    engine, _ = build_engine(config, model, no_decay=model.no_weight_decay(), device=CPU, world_size=1)
    plan = make_plan(config, 10_000, 1)
    step = TrainStep(
        engine, objectives.create("clip"), micro_batch_sizes=plan.micro_batch_sizes, kept=plan.kept,
        device=CPU, phases=Phases(CPU),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (128, 3, 16, 16), dtype=torch.uint8, generator=generator)
    texts = torch.randint(1, 200, (128, 8), generator=generator)
    found = [step(Batch(torch.arange(128), (images,), (texts,)), 1e-3).loss.value.item() for _ in range(3)]
    engine.destroy()
    return found


def test_a_settled_run_gives_the_numbers_of_the_run_with_that_integer(ranks, monkeypatch):
    config = with_batch(small(micro_batch_size=16, kept_micro_batches="auto"), 128)
    monkeypatch.setattr(
        auto_execution, "free_memory", lambda device, ranks_here: round((peak(config, 5) + 1) / MARGIN) + 1
    )
    settled, _ = AutoExecution(config, RankInfo(), 10_000).resolve_auto(CPU)
    given = with_batch(small(micro_batch_size=16, kept_micro_batches=5), 128)
    assert settled.execution.kept_micro_batches == 5
    assert ranks(1, losses, settled) == ranks(1, losses, given)
