"""Dropout is the steps' alone: workers, measurements and interruptions leave every bit of what is trained as it was.

The command's own flow, run inside a rank, with towers that drop units, whole blocks, and what transformers drops; and
behind features of a frozen tower, where views are rows of a table and captions of like length are encoded together.
"""

import json
import multiprocessing
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from amclr_scale.checkpoint.signals import Signals
from amclr_scale.commands import train
from amclr_scale.commands.embedding.of_towers import write_features
from amclr_scale.config.load import load
from amclr_scale.distributed.collectives import rank, world_size
from amclr_scale.distributed.launcher import RankInfo
from amclr_scale.metrics.stopwatch import Stopwatch
from amclr_scale.torchvision_ops import import_torchvision

STEPS, BATCH = 4, 16
SMALL = [
    f"train.global_batch_size={BATCH}", f"train.samples={STEPS * BATCH}", "data.image_size=32",
    "data.context_length=12", "model.embedding_width=16", "optimizer.lr=0.01", "objective.name=isogclr",
    "execution.threads=1", "execution.micro_batch_size=5", f"checkpoint.every_samples={STEPS // 2 * BATCH}",
    "checkpoint.keep=9",
]  # fmt: skip
TOWERS = {
    "own": ["model.image.width=8", "model.image.dropout=0.2", "model.text.width=16", "model.text.dropout=0.2"],
    "transformers": ["model.image.width=8", "model.text.name=transformers/{folder}/distilbert"],
    "timm": ["model.image.name=timm/test_vit", "model.text.width=16"],
    "features": [
        "model.image.width=8", "model.image.frozen=true", "model.text.width=16", "model.text.dropout=0.2",
        "objective.name=amclr", "objective.omega=1", "data.resident=host", "data.features.image={folder}/image.npy",
        "data.augmentation={crop_scale: [1, 1], flip: 0}", "data.image_views=1", "data.image_view_from=group",
        "data.image_group=json.concept", "data.text_views=1", "execution.trim_texts=true",
    ],
}  # fmt: skip
DISTILBERT = {"model_type": "distilbert", "dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "dropout": 0.2}


def drop_blocks(stack: ExitStack) -> None:
    """Of every timm model, which have a rate for it but no key of ours."""
    import_torchvision()
    import timm

    plain = timm.create_model
    stack.enter_context(mock.patch.object(timm, "create_model", lambda *a, **k: plain(*a, **k, drop_path_rate=0.5)))


def given_for(folder: str, tower: str) -> list[str]:
    return [*SMALL, *(word.replace("{folder}", folder) for word in TOWERS[tower])]


def run(folder: str, name: str, tower: str, *words: str) -> dict[str, Tensor]:
    """`amclr-scale train` in this process, whose group stays; gives the weights and the state that the run left."""
    given = [*given_for(folder, tower), f"run.folder={folder}", f"run.name={name}", *words]
    info = RankInfo(rank(), rank(), world_size(), world_size())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, MASTER_ADDR="127.0.0.1"))
        stack.enter_context(mock.patch("amclr_scale.distributed.process_group.stop"))
        stack.enter_context(mock.patch("amclr_scale.metrics.curve.draw_if_possible", return_value=(None, "")))
        pool = multiprocessing.current_process()._config  # whose processes are daemons, which may have no children
        stack.enter_context(mock.patch.dict(pool, daemon=False))
        if tower == "timm":
            drop_blocks(stack)
        train.run(load(None, given, world_size()), None, info, Stopwatch(), Signals())
    left = Path(folder) / name
    return load_file(left / "weights.safetensors") | load_file(left / "objective.safetensors")


def interrupted(folder: str, name: str) -> str:
    """A copy of a run as it was half-way."""
    copy = Path(folder) / f"{name}-resumed"
    shutil.copytree(Path(folder) / name, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    for file in ("weights.safetensors", "objective.safetensors", "evaluation.json"):
        (copy / file).unlink()
    return copy.name


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(got[key], value), key


@pytest.mark.parametrize("tower", TOWERS)
def test_workers_and_interruptions(ranks, tmp_path, tower):
    folder = str(tmp_path)
    (tmp_path / "distilbert").mkdir()
    (tmp_path / "distilbert" / "config.json").write_text(json.dumps(DISTILBERT))
    if tower == "features":
        list(write_features(load(None, given_for(folder, tower)), device="cpu", batch_size=256))
    whole = [ranks(1, run, folder, f"w{n}", tower, f"execution.workers={n}")[0] for n in (0, 1, 2)]
    assert_equal(whole[1], whole[0])
    assert_equal(whole[2], whole[0])
    for before, after in ((0, 2), (1, 1), (2, 0)) if tower == "own" else ((1, 2),):
        name = interrupted(folder, f"w{before}")
        resumed = ranks(1, run, folder, name, tower, f"execution.workers={after}", "resume=auto")[0]
        assert_equal(resumed, whole[0])


def test_two_ranks_at_stage_2(ranks, tmp_path):
    folder, stage = str(tmp_path), "execution.zero_stage=2"
    whole, _ = ranks(2, run, folder, "w2", "own", stage, "execution.workers=2")
    other, _ = ranks(2, run, folder, "w1", "own", stage, "execution.workers=1")
    assert_equal(other, whole)
    name = interrupted(folder, "w2")
    resumed, _ = ranks(2, run, folder, name, "own", stage, "execution.workers=1", "resume=auto")
    assert_equal(resumed, whole)


def test_measurements(ranks, tmp_path):
    folder = str(tmp_path)
    whole = ranks(1, run, folder, "plain", "own")[0]
    environment = json.loads((tmp_path / "plain" / "environment.json").read_text())
    assert environment["no_weight_decay"]["text_tower.tokens.positions.weight"] == "position"
    words = [
        "evaluation.splits=[emoji/val_style]", "evaluation.every_samples=32", f"run.probe.samples={4 * BATCH}",
        "run.probe.every_samples=32", "run.diagnostics=true", "evaluation.resamples=0",
    ]  # fmt: skip
    assert_equal(ranks(1, run, folder, "watched", "own", *words)[0], whole)
