"""A run that was interrupted is the run that was not: bit for bit in the same layout, to rounding in any other."""

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from amclr_scale.checkpoint.pieces import flats
from tests.checkpoint.trainer import OPTIONS, Trainer, run


def assert_equal(got, want):
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("objective", "optimizer"), [("isogclr", "adamw"), ("amclr", "nadam")])
def test_the_same_layout_goes_on_bit_for_bit(ranks, tmp_path, stage, objective, optimizer):
    how = {"objective": objective, "optimizer": optimizer, "zero_stage": stage, "dropout": 0.2, "layout": "sharded"}
    whole = ranks(2, run, str(tmp_path), 0, 6, 3, **how)
    again = ranks(2, run, str(tmp_path), 3, 6, **how)
    for (losses, everything), (later, resumed) in zip(whole, again, strict=True):
        assert later == losses[3:]
        assert_equal(resumed, everything)


@pytest.mark.parametrize("optimizer", ["sgd", "lion", "radam", "adamp", "lamb", "lars"])
def test_every_optimizer_goes_on_bit_for_bit(ranks, tmp_path, optimizer):
    for stage in (0, 2):
        how = {"objective": "clip", "optimizer": optimizer, "zero_stage": stage}
        folder = str(tmp_path / str(stage))
        (losses, everything), _ = ranks(2, run, folder, 0, 4, 2, **how)
        (later, resumed), _ = ranks(2, run, folder, 2, 4, **how)
        assert later == losses[2:]
        assert_equal(resumed, everything)


@pytest.mark.parametrize("objective", OPTIONS)
def test_two_one_four_ranks_and_stages_zero_two_three(ranks, tmp_path, objective):
    how = {"objective": objective}
    (losses, whole), _ = ranks(2, run, str(tmp_path / "whole"), 0, 8, **how)
    trace, begin, everything = [], 0, {}
    for world, stage, end, layout in (
        (2, 0, 2, "sharded"),
        (1, 2, 4, "replicated"),
        (4, 3, 6, "sharded"),
        (2, 1, 8, "auto"),
    ):
        part, everything = ranks(
            world, run, str(tmp_path / "parts"), begin, end, end, zero_stage=stage, layout=layout, **how
        )[0]
        trace, begin = trace + part, end
    assert trace == pytest.approx(losses, rel=1e-5)
    averages = [name for name, value in whole.items() if name.startswith("teacher.") and value.is_floating_point()]
    assert len(averages) > 10
    for name in averages:
        assert (everything[name] - whole[name]).norm() <= 1e-4 * whole[name].norm(), name


def test_bf16_keeps_its_masters(ranks, tmp_path):
    for stage in (1, 3):
        how = {"objective": "sogclr", "zero_stage": stage, "precision": "bf16"}
        folder = str(tmp_path / str(stage))
        (losses, everything), _ = ranks(2, run, folder, 0, 6, 3, **how)
        (later, resumed), _ = ranks(2, run, folder, 3, 6, **how)
        assert later == losses[3:]
        assert_equal(resumed, everything)


def resumed_in_another_order(folder: str, stage: int) -> dict[str, tuple[list[Any], list[Any]]]:
    """Save with parameters in the order of the model's definition, as before they were sorted, and load as of today.

    Returns:
        What there was before and after: the order of the optimizer's parameters, weights, losses of further steps.
    """
    with (
        mock.patch("amclr_scale.engine.zero.alignment.granularity", return_value=1),
        mock.patch("amclr_scale.engine.optimizers.granularity", return_value=1),
    ):
        before = Trainer("sogclr", zero_stage=stage)
    before.train(0, 3)
    before.save(Path(folder), 3)
    after = Trainer("sogclr", zero_stage=stage)
    after.load(Path(folder))
    trainers = (before, after)
    orders = [[part.name for flat in flats(t.engine) for part in flat.parts] for t in trainers]
    weights = [[x.clone() for x in t.everything().values()] for t in trainers]
    losses = [t.train(3, 6) for t in trainers]
    for trainer in trainers:
        trainer.close()
    return {"orders": (orders[0], orders[1]), "weights": (weights[0], weights[1]), "losses": (losses[0], losses[1])}


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_checkpoints_from_before_parameters_were_sorted(ranks, tmp_path, stage):
    for found in ranks(2, resumed_in_another_order, str(tmp_path), stage):
        assert found["orders"][0] != found["orders"][1]
        for want, got in zip(*found["weights"], strict=True):
            assert torch.equal(want, got)
        assert found["losses"][1] == pytest.approx(found["losses"][0], rel=1e-6)
