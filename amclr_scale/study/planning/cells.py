"""The cells of a study: from a plan to one configuration per arm, batch size, axis value and seed.

What a cell gets is derived from what the plan holds equal (lengths.py); everything else follows from the configuration
that all arms share. Every cell's configuration is checked before the first one runs.
"""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from amclr_scale.config.load import build, from_words, merge, read_file, recipe_hash
from amclr_scale.config.objective_options import find
from amclr_scale.config.schema import Config
from amclr_scale.data.names import probe_name, split_names
from amclr_scale.data.sources import embedded_splits
from amclr_scale.encoders.start.hub_names import parse
from amclr_scale.encoders.start.taken import resolve
from amclr_scale.engine.batch_plan import make_plan
from amclr_scale.engine.schedules import peak_learning_rate
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.evaluation.suites.of_runs import outcomes
from amclr_scale.metrics.scores import GEOMETRY, describe
from amclr_scale.study.planning.arms import CONTROLS
from amclr_scale.study.planning.cost import encoder_cost, encoder_flops, matrices, negatives, pairwise_flops, peak_gib
from amclr_scale.study.planning.features import Features, taken
from amclr_scale.study.planning.labels import labels_of
from amclr_scale.study.planning.lengths import Rates, samples_of
from amclr_scale.study.planning.plan import RANKS, SWEPT, WARMUP, ArmPlan, Role, StudyPlan
from amclr_scale.study.planning.variants import (
    Combination,
    combinations,
    further_views,
    kept_settings,
    variant_name,
    without_places,
    words_of,
)


@dataclass(frozen=True)
class Planned:
    """One cell, and the numbers that follow from it.

    Attributes:
        name: unique; also its run folder's.
        variant: the name without the seed.
        setting: the variant without a swept learning rate.
        role: whether it is scored, or chooses a learning rate for those that are.
        waits: it is scored at a learning rate that its tuning cells have yet to choose; `config` has another one.
        words: overrides of the study's configuration, all of them part of the recipe.
        config: with its `execution`, which is no part of the recipe.
        encoder_cost: forward passes of both towers per sample, relative to plain CLIP.
        ranks: it runs on.
        features: of another cell that it reads, which runs before it.
    """

    name: str
    variant: str
    setting: str
    role: Role
    waits: bool
    arm: str
    label: str
    global_batch_size: int
    seed: int
    axes: Mapping[str, Any]
    words: tuple[str, ...]
    config: Config = field(repr=False)
    samples: int
    steps: int
    epochs: float
    lr: float
    encoder_cost: float
    ranks: int
    features: Features | None = None

    @property
    def recipe_hash(self) -> str:
        return recipe_hash(self.config)

    @property
    def num_samples(self) -> int:
        """Of the data set."""
        return round(self.samples / self.epochs)

    @property
    def negatives(self) -> int:
        """Per anchor and term."""
        return negatives(self.config, self.num_samples)

    @property
    def comparisons(self) -> int:
        """Per anchor over all terms."""
        return matrices(self.config, self.num_samples) * self.negatives

    @property
    def flops(self) -> tuple[float, float]:
        """Useful operations of the whole cell: both towers, and the similarities."""
        pairs = pairwise_flops(self.config, self.num_samples)
        return encoder_flops(self.config) * self.samples, pairs * self.samples

    def entry(self) -> dict[str, Any]:
        """Its line in cells.json."""
        return {
            "cell": self.name, "role": self.role, "waits": self.waits, "arm": self.arm,
            "label": self.label, "global_batch_size": self.global_batch_size,
            "seed": self.seed, "axes": dict(self.axes), "recipe_hash": "" if self.waits else self.recipe_hash,
            "words": [] if self.waits else list(self.words), "samples": self.samples, "steps": self.steps,
            "epochs": round(self.epochs, 4), "lr": None if self.waits else self.lr,
            "encoder_cost": self.encoder_cost, "negatives": self.negatives, "comparisons": self.comparisons,
            "flops": sum(self.flops), "ranks": self.ranks, "features_of": self.features and self.features.of,
        }  # fmt: skip


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
        lines += list(_check(plan, cells))
    elif cells:
        lines += list(_check_metrics(plan, cells[0].config))
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
    return lines + (list(_check_metrics(plan, cells[0].config)) if cells else [])


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


def reference_of(plan: StudyPlan, cells: Sequence[Planned]) -> tuple[str, int]:
    """The arm and batch size that everything is compared with."""
    arm = plan.reference.arm
    batches = [cell.global_batch_size for cell in cells if cell.arm == arm]
    return arm, plan.reference.global_batch_size or max(batches, default=0)


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


def _check(plan: StudyPlan, cells: Sequence[Planned]) -> Iterator[str]:
    """What only all cells together show."""
    if not cells:
        yield "skip: leaves no cell to run"
        return
    for name in sorted({cell.name for cell in cells if sum(other.name == cell.name for other in cells) > 1}):
        yield f"axes: two cells are called {name}; the values differ too little to be told apart in a name"
    for key in plan.axes:
        if not any(key in cell.axes for cell in cells):
            yield f"axes.{key}: no arm's objective has this option"
    arm, batch = reference_of(plan, cells)
    if not any(cell.arm == arm and cell.global_batch_size == batch for cell in cells):
        there = sorted({f"{cell.arm} at {cell.global_batch_size}" for cell in cells if cell.arm == arm})
        yield f"reference: expected one of the cells ({', '.join(there) or 'none of this arm'}), got {arm} at {batch}"
    if any(cell.features and not isinstance(cell.config.data.train, str) for cell in cells):
        yield "data.train: expected one data set where an arm has features_of, got several"
    sets: dict[Path, dict[str, None]] = {}
    for cell in cells:
        if cell.features:
            sets.setdefault(cell.features.folder, {})[str(cell.config.data.train)] = None
    for names in dict.fromkeys(tuple(found) for found in sets.values() if len(found) > 1):
        yield f"data.train: expected one data set for all that read features of one cell, got {', '.join(names)}"
    yield from _check_metrics(plan, cells[0].config)


def _check_metrics(plan: StudyPlan, config: Config) -> Iterator[str]:
    """Outcomes that no evaluation of the configuration can have."""
    evaluation = config.evaluation
    splits = split_names(evaluation)
    tests = [*splits, *(probe_name(probe, evaluation) for probe in evaluation.probes)]
    asked = [("metrics", metric) for metric in plan.metrics]
    asked += [("tuning.metric", plan.tuning.metric)] if plan.tuning.metric else []
    for where, metric in asked:
        for key in metric.keys:
            suite, _, number = key.partition("/")
            if suite in evaluation.suites:
                known_numbers = outcomes(suite)
                if number not in known_numbers:
                    yield f"{where}: {key}: {suite} has no such number{did_you_mean(number, known_numbers)}"
                continue
            split = max((one for one in tests if key.startswith(f"{one}/")), key=len, default=None)
            if split is None:
                held = ", ".join(tests) or "none"
                yield f"{where}: {key}: the configuration measures no such split; those of evaluation.splits: {held}"
                continue
            name = key.removeprefix(f"{split}/")
            known = describe(name)
            if known is None and not evaluation.evaluators:
                yield f"{where}: {key}: expected a number such as {split}/image_to_text_R@1 or {split}/zero_shot_top1"
            elif known is not None and known[0] is GEOMETRY and not evaluation.geometry:
                yield f"{where}: {key}: evaluation.geometry is false, so it is not measured"
            elif name.startswith("zero_shot") and evaluation.classes is None and splits.get(split) in embedded_splits():
                yield f"{where}: {key}: evaluation.classes is null, so there is no zero-shot classification"
