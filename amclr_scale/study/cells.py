"""The cells of a study: from a plan to one configuration per arm, batch size, axis value and seed.

What a cell gets is derived from what the plan holds equal; everything else follows from the configuration that all
arms share. Every cell's configuration is checked before the first one runs.
"""

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from amclr_scale.config.load import build, from_words, merge, read_file, recipe_hash
from amclr_scale.config.objective_options import option_models
from amclr_scale.config.schema import Config
from amclr_scale.engine.plan import make_plan
from amclr_scale.engine.schedules import peak_learning_rate
from amclr_scale.errors import UserError
from amclr_scale.study.controls import CONTROLS
from amclr_scale.study.plan import ArmPlan, StudyPlan


@dataclass(frozen=True)
class Planned:
    """One cell, and the numbers that follow from it.

    Attributes:
        name: unique; also its run folder's.
        words: overrides of the study's configuration, all of them part of the recipe.
        encoder_cost: forward passes of both towers per sample, relative to plain CLIP.
        negatives: per anchor and term.
        comparisons: per anchor over all terms.
        flops: of the whole cell, useful ones; None where they are not known.
    """

    name: str
    arm: str
    label: str
    global_batch_size: int
    seed: int
    axes: Mapping[str, Any]
    words: tuple[str, ...]
    config: Config
    samples: int
    steps: int
    epochs: float
    lr: float
    encoder_cost: float
    negatives: int
    comparisons: int
    flops: float | None = None

    @property
    def recipe_hash(self) -> str:
        return recipe_hash(self.config)

    def entry(self) -> dict[str, Any]:
        """Its line in cells.json."""
        return {
            "cell": self.name, "arm": self.arm, "label": self.label, "global_batch_size": self.global_batch_size,
            "seed": self.seed, "axes": dict(self.axes), "recipe_hash": self.recipe_hash, "words": list(self.words),
            "samples": self.samples, "steps": self.steps, "epochs": round(self.epochs, 4), "lr": self.lr,
            "encoder_cost": self.encoder_cost, "negatives": self.negatives, "comparisons": self.comparisons,
            "flops": self.flops,
        }  # fmt: skip


def base_tree(plan: StudyPlan) -> dict[str, Any]:
    """The configuration that all arms share, before their words."""
    return merge(read_file(Path(plan.config), argument="config"), from_words(plan.words))


def samples_per_epoch(plan: StudyPlan, tree: Mapping[str, Any]) -> float:
    """N: the plan's, or from the index of the data.

    Raises:
        UserError: the data is not usable, and the plan does not say its size.
    """
    if plan.num_samples is not None:
        return float(plan.num_samples)
    from amclr_scale.data.indexing import open_index
    from amclr_scale.data.order import Order

    config = build(merge(dict(tree), {"train": {"epochs": 1}}))
    index = open_index(config.data)
    order = Order(
        index.first_id, seed=0, lanes=config.data.lanes, window=config.data.shuffle_window,
        parts=index.parts if config.data.weights else None, weights=config.data.weights,
    )  # fmt: skip
    return float(order.samples_per_epoch)


def make_cells(plan: StudyPlan, tree: Mapping[str, Any], epoch: float) -> list[Planned]:
    """Every cell of a plan, checked; those that the plan leaves out are left out.

    Args:
        plan: the plan.
        tree: `base_tree(plan)`.
        epoch: samples per epoch.

    Raises:
        UserError: one line per mistake, each with the cells it was found in.
    """
    cells: list[Planned] = []
    mistakes: dict[str, list[str]] = {}
    for arm in plan.arms:
        for batch in arm.batch_sizes or plan.batch_sizes:
            for axes in _combinations(plan, arm, tree):
                for seed in plan.seeds:
                    name = cell_name(arm.name, batch, axes, seed)
                    if any(fnmatch.fnmatchcase(name, pattern) for pattern in plan.skip):
                        continue
                    try:
                        cells.append(_cell(plan, tree, arm, name, batch, axes, seed, epoch))
                    except UserError as error:
                        for line in str(error).splitlines():
                            mistakes.setdefault(line, []).append(name)
    lines = [f"{line} (in {where[0]}{_more(where)})" for line, where in mistakes.items()]
    if not mistakes:
        lines += list(_check(plan, cells))
    if lines:
        raise UserError("\n".join(lines))
    return cells


def cell_name(arm: str, batch: int, axes: Mapping[str, Any], seed: int) -> str:
    """Such as sogclr-B128-gamma0.6-s0."""
    parts = [f"{key.rpartition('.')[2]}{_plain(value)}" for key, value in axes.items()]
    return "-".join([arm, f"B{batch}", *parts, f"s{seed}"])


def _plain(value: Any) -> str:
    """A value as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")


def _more(where: Sequence[str]) -> str:
    return f" and {len(where) - 1} more cells" if len(where) > 1 else ""


def _words(plan: StudyPlan, arm: ArmPlan, batch: int) -> list[str]:
    """The arm's words, with batch sizes put in."""
    known = CONTROLS[arm.like or arm.name]
    return [_batch_sizes(word, batch, min(plan.batch_sizes)) for word in (*known.words, *arm.words)]


def _batch_sizes(word: str, batch: int, smallest: int) -> str:
    """`B`, `B/k` and `smallest` as numbers.

    Raises:
        UserError: k does not divide B.
    """
    key, _, value = word.partition("=")
    if value == "smallest":
        return f"{key}={smallest}"
    found = re.fullmatch(r"B(?:/(\d+))?", value)
    if not found:
        return word
    divisor = int(found[1] or 1)
    if divisor < 1 or batch % divisor:
        raise UserError(f"batch_sizes: expected multiples of {divisor} ({word}), got {batch}")
    return f"{key}={batch // divisor}"


def _combinations(plan: StudyPlan, arm: ArmPlan, tree: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """All combinations of axis values; options that the arm's objective does not have are left out."""
    objective = merge(dict(tree), from_words(_words(plan, arm, 0)))["objective"]["name"]
    options = option_models()[objective].model_fields
    axes = {
        key: values
        for key, values in plan.axes.items()
        if not key.startswith("objective.") or key.removeprefix("objective.") in options
    } | arm.axes
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _cell(
    plan: StudyPlan, tree: Mapping[str, Any], arm: ArmPlan, name: str, batch: int, axes: Mapping[str, Any], seed: int,
    epoch: float,
) -> Planned:  # fmt: skip
    """One cell: words in the order arm, axes, batch size, budget, learning rate, seed."""
    control = CONTROLS[arm.like or arm.name]
    words = _words(plan, arm, batch)
    objective = merge(dict(tree), from_words(words))["objective"]
    options = option_models()[objective["name"]].model_fields
    named = {word.partition("=")[0] for word in words}
    if plan.temperature is not None and "temperature" in options and "objective.temperature" not in named:
        words.append(f"objective.temperature={plan.temperature!r}")
    words += [f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...').strip()}"
              if not isinstance(value, str) else f"{key}={value}" for key, value in axes.items()]  # fmt: skip
    if "objective.omega" in axes:
        words += [f"data.{key}={axes['objective.omega']}" for key in ("image_views", "text_views")]
    words.append(f"train.global_batch_size={batch}")
    samples = _samples(plan, batch, epoch)
    words.append(f"train.samples={samples}")
    words += [f"optimizer.lr_rule={plan.lr.rule}", f"optimizer.lr_reference_batch={plan.lr.reference_batch}"]
    if plan.lr.base is not None and "optimizer.lr" not in axes:
        words.append(f"optimizer.lr={plan.lr.base!r}")
    if plan.warmup_samples is not None:
        words.append(f"optimizer.warmup_samples={plan.warmup_samples}")
    if plan.warmup_share is not None:
        words.append(f"optimizer.warmup_samples={round(plan.warmup_share * samples)}")
    words.append(f"seed={seed}")

    config = build(merge(dict(tree), from_words(words)), plan.execution.ranks)
    run = make_plan(config, epoch, plan.execution.ranks)
    group = config.objective.get("group_size") or batch
    omega = config.objective.get("omega") or 0
    # an image's views against every view of the other texts, and in xAmCLR its base view against each further one
    pairings = (1 + omega) ** 2 + (2 * omega if config.objective["name"].startswith("xamclr") else 0)
    return Planned(
        name=name, arm=arm.name, label=arm.label or control.label, global_batch_size=batch, seed=seed, axes=axes,
        words=tuple(words), config=config, samples=run.total_samples, steps=run.total_steps,
        epochs=run.total_samples / epoch, lr=peak_learning_rate(config.optimizer, batch),
        encoder_cost=(2 + config.data.image_views + config.data.text_views) / 2,
        negatives=group - 1, comparisons=pairings * (group - 1),
    )  # fmt: skip


def _samples(plan: StudyPlan, batch: int, epoch: float) -> int:
    """Length of a cell in samples, a whole number of steps."""
    budget = plan.budget
    if plan.held_equal == "steps":
        return batch * (budget.steps or 1)
    wanted = budget.samples or (budget.epochs or 0) * epoch
    return max(1, round(wanted / batch)) * batch


def _check(plan: StudyPlan, cells: Sequence[Planned]) -> Iterator[str]:
    """What only all cells together show."""
    if not cells:
        yield "skip: leaves no cell to run"
    twice = {cell.name for cell in cells if sum(other.name == cell.name for other in cells) > 1}
    for name in sorted(twice):
        yield f"axes: two cells are called {name}; the values differ too little to be told apart in a name"
    arm, batch = reference_of(plan)
    if not any(cell.arm == arm and cell.global_batch_size == batch for cell in cells):
        yield f"reference: expected one of the cells, got arm {arm} at a global batch of {batch}"
    if cells:
        evaluation = cells[0].config.evaluation
        for metric in plan.metrics:
            for key in metric.keys:
                if not any(key.startswith(f"{split}/") for split in evaluation.splits) and not evaluation.probes:
                    splits = ", ".join(evaluation.splits) or "none"
                    yield f"metrics: {key}: the configuration measures no such split; evaluation.splits is {splits}"


def reference_of(plan: StudyPlan) -> tuple[str, int]:
    """The arm and batch size that everything is compared with."""
    arm = next(one for one in plan.arms if one.name == plan.reference.arm)
    return arm.name, plan.reference.global_batch_size or max(arm.batch_sizes or plan.batch_sizes)
