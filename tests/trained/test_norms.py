"""A run's own table is what `evaluate` finds in its folder and in its checkpoint, whatever the norm and precision."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from amclr_scale.checkpoint import files, state
from amclr_scale.commands.evaluate import main
from amclr_scale.config.load import build, dump
from amclr_scale.distributed.launcher import read_rank_info
from amclr_scale.encoders.image_towers import build_image_tower
from amclr_scale.engine.build import build_trainer, open_data
from amclr_scale.engine.step import TrainStep
from amclr_scale.evaluation.run import Evaluator
from amclr_scale.metrics.phases import Phases
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.trained.weights import save_weights
from tests.evaluation.shards import write_split

CPU = torch.device("cpu")
STEPS = 4


def train(folder, split, norm="group", weights=None, **execution) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """On each rank: a few steps, an evaluation, a checkpoint, weights. Returns its table and its buffers."""
    import torch.distributed as dist

    world_size = dist.get_world_size()
    tree = {
        "data": {"train": split, "image_size": 32, "context_length": 12, "lanes": 2},
        "train": {"global_batch_size": 16, "samples": 16 * STEPS},
        "model": {
            "embedding_width": 16,
            "image": {"width": 8, "norm": norm, "weights": weights},
            "text": {"width": 16},
        },
        "evaluation": {"splits": [split], "classes": None, "resamples": 0, "geometry": True, "batch_size": 10},
        "execution": {"threads": 1, **execution},
    }
    config, rank_info = build(tree, world_size), read_rank_info()
    inputs = open_data(config, rank_info)
    inputs.loader.seek(0)
    trainer = build_trainer(config, inputs, device=CPU, world_size=world_size, folder=folder, stopwatch=Stopwatch())
    step = TrainStep(
        trainer.engine, trainer.objective, micro_batch_sizes=inputs.plan.micro_batch_sizes, kept=inputs.plan.kept,
        device=CPU, phases=Phases(CPU),
    )  # fmt: skip
    batches = iter(inputs.loader)
    for _ in range(STEPS):
        step(next(batches), 0.01)
    inputs.loader.close()
    buffers = {name: buffer.clone() for name, buffer in trainer.model.named_buffers()}
    results = Evaluator(config, rank=rank_info.rank, world_size=world_size)(trainer.engine)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in trainer.model.named_buffers())

    checkpoints = folder / "checkpoints"
    here = files.staging(checkpoints, STEPS)
    here.mkdir(parents=True, exist_ok=True)
    described = {
        "step": STEPS, "samples": 64, "total_steps": STEPS, "number": 1, "recipe": "r", "time": "now",
        "config": config.model_dump(mode="json"), "data_fingerprint": "f", "num_samples": 40, "packages": {},
    }  # fmt: skip
    written = state.take(trainer.engine, trainer.objective, described, CPU).write(here)
    every = [None] * world_size
    dist.all_gather_object(every, written)
    if dist.get_rank() == 0:
        files.commit(checkpoints, STEPS, [file for part in every for file in part])
        (folder / "config.yaml").write_text(dump(config))
    save_weights(folder, trainer.model, trainer.objective, speaks=dist.get_rank() == 0)
    dist.barrier()
    trainer.engine.destroy()
    return results, buffers


def evaluated(model, out, *words) -> dict[str, float]:
    assert main([str(model), "--output", str(out), *words]) == 0
    (found,) = json.loads((out / "results.json").read_text())["results"].values()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("norm", ["group", "batch", "sync", "frozen"])
def test_a_runs_table_is_what_evaluate_finds(ranks, tmp_path, norm):
    split, weights = str(write_split(tmp_path / "split", 48)), None
    if norm == "frozen":
        from amclr_scale.config.schema import ImageTower

        tower, *_ = build_image_tower(ImageTower(width=8, norm="batch"), 32)
        tower(torch.randn(16, 3, 32, 32))
        weights = str(tmp_path / "tower.safetensors")
        save_file(tower.state_dict(), weights)
    run = tmp_path / "run"
    run.mkdir()
    (results, first), (_, second) = ranks(2, train, run, split, norm, weights)
    apart = [name for name in first if not torch.equal(first[name], second[name])]
    assert bool(apart) == (norm == "batch")
    saved = load_file(run / "weights.safetensors")
    for name in first.keys() - {"normalise.mean", "normalise.std"}:
        if first[name].is_floating_point():
            torch.testing.assert_close(saved[name], (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)
    for found in (evaluated(run, tmp_path / "of run"), evaluated(run / "checkpoints", tmp_path / "of checkpoint")):
        assert found.keys() == results.keys()
        shares = [name for name in found if "R@" in name or ("rank" in name and "effective" not in name)]
        assert len(shares) > 20
        assert {name: found[name] for name in shares} == {name: results[name] for name in shares}
        assert found == pytest.approx(results, abs=1e-5)  # geometry of float32 features


@pytest.mark.ranks
@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_in_bf16_is_evaluated_in_bf16(ranks, tmp_path, stage, capsys):
    """To the bit. (At stage 3 DeepSpeed rounds once more, between a product and its bias.)"""
    split = str(write_split(tmp_path / "split", 48))
    run = tmp_path / "run"
    run.mkdir()
    ((results, _),) = ranks(1, train, run, split, precision="bf16", zero_stage=stage)
    found = evaluated(run, tmp_path / "as trained")
    assert found == results
    said = capsys.readouterr().out
    assert f"{run}, in bf16, " in said
    saved = json.loads((tmp_path / "as trained" / "results.json").read_text())
    assert saved["precision"] == {"run": "bf16"}
    assert "| | run (bf16) | chance |" in (tmp_path / "as trained" / "results.md").read_text()
    assert evaluated(run, tmp_path / "full", "--precision", "fp32") != found
    assert "in fp32, " in capsys.readouterr().out
