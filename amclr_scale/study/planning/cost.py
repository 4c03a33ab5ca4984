"""What a cell costs: operations and memory, from its configuration alone.

Useful operations count every sample once, forward and backward: 3 x the forward of both towers with all views, and the
matrix products of the objective, counted by running it on a few rows (planner/objective_traffic.py). Most are products
of all embeddings with all others: 8 B D per anchor for each (2 D in forward, 6 D in backward, for each of B keys). What
a gradient cache or recomputation does again is a choice of execution and not counted: it appears in hours.
"""

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from amclr_scale.config.objective_options import declared
from amclr_scale.config.schema import Config, Optimizer
from amclr_scale.config.teacher import lent_sides

if TYPE_CHECKING:
    from amclr_scale.memory.towers import Tower
    from amclr_scale.planner.objective_traffic import ObjectiveTrace


def group_of(config: Config) -> int:
    """Pairs that share negatives: a group where the objective has groups, else the batch."""
    return declared(config.objective).group_size or config.train.global_batch_size


def matrices(config: Config, num_samples: int) -> int:
    """Products of all embeddings with all others per step, one for every pairing of views; 0: no negatives (VICReg).

    Where rows of the data set are stored, those of all embeddings with them.
    """
    return _trace(config, num_samples).products


def negatives(config: Config, num_samples: int) -> int:
    """Per anchor and term, in a data set of so many samples."""
    return declared(config.objective, num_samples).negatives(config.train.global_batch_size)


def encoder_cost(config: Config) -> float:
    """Passes of both towers per sample, relative to one view of each; a teacher's forward is a third of one.

    A tower whose features come from a file (`data.features`) is passed by no view: where one is, of the other alone.
    Where both are, of the heads.
    """
    passes = {"image": config.data.images_each, "text": config.data.texts_each}
    run = [side for side in passes if getattr(config.data.features, side) is None] or list(passes)
    return (sum(passes[side] for side in run) + len({*run} & {*lent_sides(config)}) / 3) / len(run)


def encoder_flops(config: Config) -> float:
    """Useful operations of both towers per sample, all of its views, and of a teacher's forward."""
    image, text = _one_view(config)
    lent = sum({"image": image, "text": text}[side].forward for side in lent_sides(config))
    return image.useful * config.data.images_each + text.useful * config.data.texts_each + lent


def times_one_view(config: Config) -> float:
    """`encoder_flops` over those of one view of each side without a teacher: what equal compute divides samples by."""
    return encoder_flops(config) / sum(side.useful for side in _one_view(config))


def _one_view(config: Config) -> "tuple[_Operations, _Operations]":
    """Of each side."""
    data = config.data.model_copy(
        update={"image_views": 0, "text_views": 0, "image_negatives": 0, "text_negatives": 0}
    )  # traced once for all arms
    factors = Optimizer(lr_factors=config.optimizer.lr_factors)  # what is frozen has no backward
    asked = {"objective": config.objective} if reads_tokens(config) else {}  # whose heads work too
    return _operations(Config(data=data, model=config.model, optimizer=factors, **asked).model_dump_json())


def reads_tokens(config: Config) -> bool:
    """Whether the objective compares tokens, of either side."""
    return any(kind.endswith("_tokens") for kind in declared(config.objective).inputs)


class _Operations(NamedTuple):
    useful: float
    forward: float


@lru_cache(maxsize=32)
def _operations(config: str) -> tuple[_Operations, _Operations]:
    """Of one view of each side."""
    from amclr_scale.memory.towers import trace  # seconds of imports, which only this needs

    parsed = Config.model_validate_json(config)
    image, text = trace(parsed, "image"), trace(parsed, "text")
    return _of(image), _of(text)


def _of(tower: "Tower") -> _Operations:
    return _Operations(3 * tower.flops - 2 * tower.frozen_flops, tower.flops)


def pairwise_flops(config: Config, num_samples: int) -> float:
    """Useful operations of the objective's matrix products per sample, in a data set of so many."""
    group = group_of(config)
    return _trace(config, num_samples).flops(group) / group


def _trace(config: Config, num_samples: int) -> "ObjectiveTrace":
    counts = declared(config.objective).stored_rows == "all"  # for others it is not asked once more
    from amclr_scale.memory.towers import input_sizes  # seconds of imports

    return _traced(
        json.dumps(config.objective, sort_keys=True), config.model.embedding_width, group_of(config),
        num_samples if counts else 0, tuple(sorted(input_sizes(config).items())),
    )  # fmt: skip


@lru_cache(maxsize=256)
def _traced(
    objective: str, width: int, group: int, num_samples: int, sizes: tuple[tuple[str, int], ...]
) -> "ObjectiveTrace":
    from amclr_scale.planner.objective_traffic import trace_objective  # seconds of imports

    options: dict[str, Any] = json.loads(objective)
    return trace_objective(
        options, world_size=1, width=width, local_rows=group, distribution="reduce_scatter", gather="all",
        layout="replicated", num_samples=num_samples, sizes=dict(sizes),
    )  # fmt: skip


def peak_gib(config: Config, *, ranks: int, num_samples: int, device: Literal["cpu", "cuda"]) -> float:
    """Predicted peak memory per rank.

    Args:
        config: with its `execution`.
        ranks: W.
        num_samples: N.
        device: where it will run.
    """
    import torch

    from amclr_scale.memory.account import account

    found = account(config, world_size=ranks, num_samples=num_samples, device=torch.device(device))
    return float(found.peak_bytes) / 2**30
