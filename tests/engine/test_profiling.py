"""execution.profile: a trace of some steps, DeepSpeed's messages and operations, and the same training."""

import json
from pathlib import Path

import deepspeed
import torch

from amclr_scale import objectives
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.deepspeed_setup import build_engine
from amclr_scale.engine.profiling import SKIPPED, StepProfiler
from amclr_scale.engine.step import TrainStep
from amclr_scale.metrics.phases import Phases
from tests.engine.towers import CPU, config, local_batch, towers

SIZE, STEPS = 16, 2


def profiled(folder: Path, steps: int) -> list[float]:
    """Losses of a short run of which so many steps are profiled."""
    settings, model = config(SIZE, execution__profile=steps, execution__zero_stage=2), towers()
    plan = make_plan(settings, 100, world_size())
    with StepProfiler(folder, steps, rank()) as profiler:
        engine, _ = build_engine(
            settings, model, no_decay=model.no_weight_decay(), device=CPU, world_size=world_size(), folder=folder
        )
        clip = objectives.create("clip")
        step = TrainStep(engine, clip, micro_batch_sizes=(4, 4), device=CPU, phases=Phases(CPU))
        losses = []
        for n in range(SKIPPED + STEPS + 1):
            batch = local_batch(n, SIZE, rank(), world_size())
            report = step(batch, 0.01)
            losses.append(float(report.loss.value.detach()))
            profiler.on_step(plan.position(n + 1), batch, report)
    engine.destroy()
    deepspeed.comm.configure(enabled=False)  # its log of messages is the process's, which other tests use too
    return losses


def test_what_a_profile_writes(ranks, tmp_path):
    plain, seen = ranks(2, profiled, tmp_path / "no", 0), ranks(2, profiled, tmp_path, STEPS)
    assert seen == plain
    assert not (tmp_path / "no").exists()
    folder = tmp_path / "profile"
    for number in range(2):
        events = json.loads((folder / f"rank{number}.json").read_text())["traceEvents"]
        assert sum(event.get("name", "").startswith("ProfilerStep") for event in events) >= STEPS
        assert any(event.get("name") == "aten::addmm" for event in events)
    assert "aten::addmm" in (folder / "operators.txt").read_text()
    assert "reduce" in (folder / "messages.txt").read_text()
    assert "params" in (folder / "flops.txt").read_text()
    assert torch.isfinite(torch.tensor(plain)).all()


def test_a_run_with_too_few_steps_to_profile_ends_well(tmp_path):
    """Such as one that is resumed after its last step."""
    with StepProfiler(tmp_path, STEPS, 0):
        pass
    assert not list((tmp_path / "profile").iterdir())
