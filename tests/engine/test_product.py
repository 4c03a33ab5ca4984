"""Five optimizer steps on two ranks are those of one plain big batch, whatever a run may choose.

Every optimizer at every ZeRO stage, and every way of micro-batches (sizes, kept graphs, recomputation) at every stage
and with every optimizer: 64 of the 256 combinations, as an optimizer sees nothing of micro-batches but their gradient.
With the objective `clip`, a learned scale, gradient clipping, and rates of their own for parts of the model. The
reference is one process with torch's and timm's optimizers (`plain_run`), which knows nothing of ranks, micro-batches,
recomputation or DeepSpeed.
"""

import gc
from functools import cache
from itertools import product
from typing import Any

import pytest
from torch import Tensor

from tests.engine.towers import REFERENCES, config, differences, engine_run, plain_run

SIZE, STEPS = 16, 5
STAGES = (0, 1, 2, 3)
# Of each rank's 8 samples: images and texts encoded at once, and micro-batches whose graph is kept.
MICRO_BATCHES = (((8, 8), 1), ((3, 3), 0), ((2, 2), 2), ((3, 4), 1))
RECOMPUTATIONS = ("none", "full")
WAYS = tuple(product(MICRO_BATCHES, RECOMPUTATIONS))


def ways_of(name: str, stage: int) -> list[int]:
    """Two of `WAYS`: all of them over the stages of an optimizer, and over the optimizers of a stage."""
    first = 2 * stage + list(REFERENCES).index(name)
    return [first % len(WAYS), (first + 1) % len(WAYS)]


def recipe(name: str) -> dict[str, Any]:
    factors = {"image_tower": 0.5, "heads": 0.7, "temperature": 0.3}
    return {
        "optimizer__name": name,
        "optimizer__lr": 0.5 if name == "lars" else 0.01,
        "optimizer__lr_factors": factors,
        # Adam divides each element by its own size: at 1e-8 one whose gradient cancels moves as its rounding says.
        "optimizer__eps": 1e-4,
    }


@cache
def reference(name: str) -> tuple[dict[str, Tensor], list[float]]:
    return plain_run(config(SIZE, **recipe(name)), STEPS)


def all_runs(name: str, stage: int) -> dict[str, Any]:
    """On each rank, one engine after another in the same process."""
    gc.freeze()  # DeepSpeed's stage 3 collects garbage whenever it starts; what this process imported is none
    found = {}
    for (sizes, kept), again in (WAYS[number] for number in ways_of(name, stage)):
        changes = {"zero_stage": stage, "recompute_image": again, "recompute_text": again}
        settings = config(SIZE, **recipe(name), **{f"execution__{key}": value for key, value in changes.items()})
        found[f"micro-batches {sizes}, {kept} kept, recomputation {again}"] = engine_run(settings, sizes, kept, STEPS)
    gc.unfreeze()
    return found


def test_each_optimizer_and_each_stage_meets_all_ways_of_micro_batches():
    everything = set(range(len(WAYS)))
    assert len(WAYS) == 8
    for name in REFERENCES:
        assert {way for stage in STAGES for way in ways_of(name, stage)} == everything
    for stage in STAGES:
        assert {way for name in REFERENCES for way in ways_of(name, stage)} == everything


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", REFERENCES)
def test_two_ranks_are_one_plain_big_batch(ranks, name, stage):
    first, second = ranks(2, all_runs, name, stage)
    assert len(first) == 2
    wrong = []
    for combination, run in first.items():
        errors = differences([run, second[combination]], reference(name))
        bounds = {key: 1e-5 if key == "loss" else 1e-6 for key in errors}
        wrong += [f"{combination}: {key} {error:.1e}" for key, error in errors.items() if not error < bounds[key]]
    assert not wrong, "\n".join(wrong)
