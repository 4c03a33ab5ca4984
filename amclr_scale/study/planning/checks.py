"""What only a plan's cells show of its mistakes: cells that cannot be told apart, outcomes that nothing measures."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from amclr_scale.config.schema import Config
from amclr_scale.data.names import probe_name, split_names
from amclr_scale.data.sources import embedded_splits
from amclr_scale.errors import did_you_mean
from amclr_scale.evaluation.suites.of_runs import outcomes
from amclr_scale.metrics.scores import GEOMETRY, describe
from amclr_scale.study.planning.plan import StudyPlan
from amclr_scale.study.planning.planned import Planned, reference_of
from amclr_scale.study.planning.variants import without_rate


def check_together(plan: StudyPlan, cells: Sequence[Planned]) -> Iterator[str]:
    """What only all cells together show."""
    if not cells:
        yield "skip: leaves no cell to run"
        return
    for name in sorted({cell.name for cell in cells if sum(other.name == cell.name for other in cells) > 1}):
        yield f"axes: two cells are called {name}; the values differ too little to be told apart in a name"
    yield from _one_label(cells)
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
    yield from check_metrics(plan, cells[0].config)


def _one_label(cells: Sequence[Planned]) -> Iterator[str]:
    """Arms that are one method by their label, and have cells that a table could not tell apart."""
    first: dict[tuple[str, str, int], str] = {}
    batches: dict[tuple[str, str, str], dict[int, None]] = {}
    for cell in cells:
        axes = json.dumps(without_rate(cell.axes), sort_keys=True)
        arm = first.setdefault((cell.label, axes, cell.global_batch_size), cell.arm)
        if arm != cell.arm:
            batches.setdefault((cell.label, arm, cell.arm), {})[cell.global_batch_size] = None
    for (label, arm, other), shared in batches.items():
        yield (
            f"arms.{other}.label: expected another than that of {arm}, which has cells at the same batch size "
            f"({', '.join(map(str, shared))}) that no table could tell apart, got {label}"
        )


def check_metrics(plan: StudyPlan, config: Config) -> Iterator[str]:
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
