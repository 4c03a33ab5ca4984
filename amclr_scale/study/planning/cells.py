"""The cells of a study: from a plan to one configuration per arm, batch size, axis value and seed.

What a cell gets is derived from what the plan holds equal (lengths.py); everything else follows from the configuration
that all arms share. Every cell's configuration is checked before the first one runs.
"""

import fnmatch
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from amclr_scale.config.load import build, from_words, merge, read_file
from amclr_scale.config.objective_options import find
from amclr_scale.config.schema import Config
from amclr_scale.encoders.start.hub_names import parse
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.schedules import peak_learning_rate
from amclr_scale.errors import UserError
from amclr_scale.study.planning.arms import CONTROLS
from amclr_scale.study.planning.checks import check_metrics, check_together
from amclr_scale.study.planning.cost import encoder_cost, peak_gib
from amclr_scale.study.planning.features import taken
from amclr_scale.study.planning.labels import labels_of
from amclr_scale.study.planning.lengths import Rates, samples_of
from amclr_scale.study.planning.plan import RANKS, SWEPT, WARMUP, ArmPlan, StudyPlan
from amclr_scale.study.planning.planned import Planned
from amclr_scale.study.planning.variants import (
    Combination,
    combinations,
    further_views,
    kept_settings,
    variant_name,
    without_places,
    words_of,
)


def base_tree(plan: StudyPlan) -> dict[str, Any]:
    """The configuration that all arms share, before their words.

    Raises:
        UserError: the file or a word is not readable.
    """
    return merge(read_file(Path(plan.config), argument="config"), from_words(plan.words))


def make_cells(
    plan: StudyPlan, tree: Mapping[str, Any], epoch: float, *, rates: Rates | None = None, steps: int | None = None,
    chosen: Mapping[str, float] | None = None,
) -> list[Planned]:  # fmt: skip
    """Every cell of a plan, checked; those that the plan leaves out are left out.

    Args:
        plan: the plan.
        tree: `base_tree(plan)`.
        epoch: samples per epoch.
        rates: samples per second by setting, as measured here.
        steps: of a pilot, instead of the plan's budget.
        chosen: learning rates by setting, as tuning chose them.

    Raises:
        UserError: one line per mistake, each with the cells it was found in.
    """
    cells, lines = _collect(plan, plan.arms, tree, epoch, rates or {}, steps, chosen or {})
    if not lines:
        lines += list(check_together(plan, cells))
    elif cells:
        lines += list(check_metrics(plan, cells[0].config))
    if lines:
        raise UserError("\n".join(lines))
    return cells


def configuration_mistakes(plan: StudyPlan) -> list[str]:
    """What the configurations of a plan's cells are refused for, whatever else is wrong with the plan."""
    try:
        tree = base_tree(plan)
    except UserError as error:
        return str(error).splitlines()
    known = [arm for arm in plan.arms if (arm.like or arm.name) in CONTROLS]
    any_length = plan.model_copy(update={"held_equal": "samples"})
    cells, lines = _collect(any_length, known, tree, 1e6, {}, 1, {})
    return lines + (list(check_metrics(plan, cells[0].config)) if cells else [])


def _collect(
    plan: StudyPlan, arms: Sequence[ArmPlan], tree: Mapping[str, Any], epoch: float, rates: Rates, steps: int | None,
    chosen: Mapping[str, float],
) -> tuple[list[Planned], list[str]]:  # fmt: skip
    """The cells that can be made, and one line per mistake with the cells it was found in."""
    cells: list[Planned] = []
    mistakes: dict[str, list[str]] = {}
    for arm in arms:
        found: list[Planned] = []
        for one in combinations(plan, arm, tree, chosen):
            name = f"{variant_name(arm.name, one.batch, one.axes)}-s{one.seed}"
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in plan.skip):
                continue
            try:
                found.append(_cell(plan, tree, arm, one, epoch, rates, steps, {cell.name: cell for cell in cells}))
            except UserError as error:
                for line in str(error).splitlines():
                    mistakes.setdefault(line, []).append(name)
        try:
            cells += _that_fit(plan, arm, found, epoch) if plan.held_equal == "memory" else found
        except UserError as error:
            mistakes.setdefault(str(error), []).append(arm.name)
    return cells, [f"{line} (in {where[0]}{_more(where)})" for line, where in mistakes.items()]


def _more(where: Sequence[str]) -> str:
    return f" and {len(where) - 1} more" if len(where) > 1 else ""


def _settled(tree: Mapping[str, Any], words: Sequence[str], ranks: int) -> Config:
    """A cell's configuration, with what `model.init` settles: one model in all cells, whenever they start."""
    config = build(merge(dict(tree), from_words(list(words))), ranks)
    name = parse(config.model.init or "")
    if name is not None and not name.commit:
        raise UserError(
            f"model.init: expected {name}@COMMIT (40 hexadecimal digits) in a plan, since a branch may be another "
            f"model for a later cell, got {name}"
        )
    return resolve(config, ranks)


def _cell(
    plan: StudyPlan, tree: Mapping[str, Any], arm: ArmPlan, one: Combination, epoch: float, rates: Rates,
    steps: int | None, above: Mapping[str, Planned],
) -> Planned:  # fmt: skip
    """One cell: words in the order arm, temperature, axes, batch size, learning rate, length, warm-up, seed."""
    batch, axes, seed = one.batch, one.axes, one.seed
    ranks = int(axes.get(RANKS, plan.execution.ranks))
    features, words = taken(plan, arm, seed, words_of(plan, arm, batch), above)
    named = {word.partition("=")[0] for word in words}
    own = named | set(axes)  # what the arm or its axes say goes before what the plan says of all cells
    section = merge(dict(tree), from_words(words))["objective"]
    has_temperature = "temperature" in find(section).options.model_fields
    if plan.temperature is not None and has_temperature and "objective.temperature" not in named:
        words.append(f"objective.temperature={plan.temperature!r}")
    varied = [(key, value) for key, value in axes.items() if key != RANKS]
    words += [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in varied]
    if any(key.startswith("objective.") for key in axes):
        words += further_views(merge(dict(tree), from_words(words)))
        named = set()
    words += without_places(merge(dict(tree), from_words(words)), named)
    words.append(f"train.global_batch_size={batch}")
    words += [f"optimizer.lr_rule={plan.lr.rule}"] if plan.lr.rule else []
    words += [f"optimizer.lr_reference_batch={plan.lr.reference_batch}"] if plan.lr.reference_batch else []
    if plan.lr.base is not None and SWEPT not in own:
        words.append(f"optimizer.lr={plan.lr.base!r}")

    words = [*kept_settings(tree, words), *words]
    draft = _settled(tree, [*words, f"train.samples={batch}"], ranks)
    samples = steps * batch if steps else samples_of(plan, draft, one.setting, epoch, rates, arm.budget_factor)
    words.append(f"train.samples={samples}")
    if plan.warmup_samples is not None and WARMUP not in own:
        words.append(f"{WARMUP}={plan.warmup_samples}")
    if plan.warmup_share is not None and WARMUP not in own:
        words.append(f"{WARMUP}={round(plan.warmup_share * samples)}")
    words.append(f"seed={seed}")

    execution = [*plan.execution.words, *plan.execution.words_by_batch.get(batch, [])]
    config = _settled(tree, [*words, *execution], ranks)
    run = make_plan(config, epoch, ranks)
    variant = variant_name(arm.name, batch, axes)
    return Planned(
        name=f"{variant}-s{seed}", variant=variant, setting=one.setting, role=one.role, waits=one.waits, arm=arm.name,
        label=labels_of(plan)[arm.name], global_batch_size=batch, seed=seed, axes=axes,
        words=tuple(words), config=config, samples=run.total_samples, steps=run.total_steps,
        epochs=run.total_samples / epoch, lr=peak_learning_rate(config.optimizer, batch),
        encoder_cost=encoder_cost(config), ranks=ranks, features=features,
    )  # fmt: skip


def _that_fit(plan: StudyPlan, arm: ArmPlan, cells: Sequence[Planned], epoch: float) -> list[Planned]:
    """Of every combination of axis values, the cells at the largest batch size that fits into `budget.gib`.

    Raises:
        UserError: not even the smallest one fits.
    """
    limit, chosen = plan.budget.gib or 0.0, list[Planned]()
    known: dict[str, float] = {}  # seeds need the same

    def need(cell: Planned) -> float:
        if cell.setting not in known:
            known[cell.setting] = predicted_gib(plan, cell, epoch)
        return known[cell.setting]

    alike: dict[str, list[Planned]] = {}
    for cell in cells:
        alike.setdefault(json.dumps([dict(cell.axes), cell.seed]), []).append(cell)
    for same in alike.values():
        same.sort(key=lambda cell: -cell.global_batch_size)
        fitting = next((cell for cell in same if need(cell) <= limit), None)
        if fitting is None:
            raise UserError(
                f"budget.gib: {arm.name} needs {need(same[-1]):.2f} GiB at its smallest batch of "
                f"{same[-1].global_batch_size}, got {limit:g}; give a smaller batch size or execution.micro_batch_size"
            )
        chosen.append(fitting)
    return chosen


def predicted_gib(plan: StudyPlan, cell: Planned, epoch: float) -> float:
    """Peak memory per rank, predicted."""
    return peak_gib(cell.config, ranks=cell.ranks, num_samples=round(epoch), device=plan.execution.device)
