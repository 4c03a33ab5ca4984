"""From a YAML file and `key=value` words to a checked plan: every mistake in one answer, the key first.

A plan may name another plan in `base:` and then holds differences only. Imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from amclr_scale.config.load import from_words, merge, mistakes, read_file
from amclr_scale.config.shipped import find, find_from
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.study.planning.amounts import MOST_OF_EFFECT, POINTS, amount, unit_of_keys, written
from amclr_scale.study.planning.arms import ABSENT, CONTROLS
from amclr_scale.study.planning.plan import RANKS, SWEPT, Budget, StudyPlan


def plan_tree(path: Path, words: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a plan as they are written, with `key=value` words over them.

    Raises:
        UserError: the file or a word is not readable.
    """
    path = find(path, "studies")
    tree = merge(read_file(path, argument="PLAN"), from_words(words))
    tree.setdefault("name", path.stem)
    if isinstance(tree.get("arms"), list):
        tree["arms"] = [{"name": arm} if isinstance(arm, str) else arm for arm in tree["arms"]]
    if isinstance(tree.get("config"), str):
        tree["config"] = str(find_from(path, tree["config"]).resolve())
    return tree


def load_plan(path: Path, words: Sequence[str] = ()) -> StudyPlan:
    """Read a plan, put `key=value` words over it, check what can be checked without the training data.

    Raises:
        UserError: one line per mistake, all of them, the key first: those of the plan, and where it has any, those of
            the configurations that it would make, too.
    """
    tree = plan_tree(path, words)
    plan, lines, wrong = _validated(tree)
    for check, keys in _CHECKS:
        if not wrong & set(keys):
            lines += check(plan)
    ranks = any(line.partition(":")[0].endswith(RANKS) for line in lines)
    if lines and not ranks and not wrong & {"config", "arms", "batch_sizes", "metrics"}:
        from amclr_scale.study.planning.cells import configuration_mistakes

        lines += configuration_mistakes(plan)
    if lines:
        raise UserError("\n".join(lines))
    return plan


# What stands in for a key that is needed and wrong, while the others are checked.
_STAND_INS: dict[str, Any] = {
    "name": "plan", "config": "", "arms": [{"name": "clip"}], "batch_sizes": [1], "seeds": [0], "budget": {},
    "held_equal": "samples", "metrics": [{"name": "R@mean", "keys": ["R@mean"]}], "margin": "1 point",
}  # fmt: skip


def _validated(tree: dict[str, Any]) -> tuple[StudyPlan, list[str], set[str]]:
    """The plan, what is wrong with its keys, and which of them are: those have their default or a stand-in."""
    try:
        return StudyPlan.model_validate(tree), [], set()
    except ValidationError as error:
        wrong = {str(detail["loc"][0]) for detail in error.errors()}
        right = {key: value for key, value in tree.items() if key not in wrong}
        stand_ins = {key: value for key, value in _STAND_INS.items() if key in wrong}
        return StudyPlan.model_validate(right | stand_ins), mistakes(error, root=StudyPlan), wrong


_BUDGET = {
    "samples": ("samples", "epochs"),
    "steps": ("steps",),
    "compute": ("flops", "samples", "epochs"),
    "wall_clock": ("hours",),
    "memory": ("samples", "epochs"),
    "grid": ("samples", "epochs"),
}


def _check_numbers(plan: StudyPlan) -> Iterator[str]:
    if plan.expected and (plan.expected.device is None) == (plan.expected.samples_per_second is None):
        yield "expected: needs exactly one of expected.device and expected.samples_per_second"
    for key, values in (
        ("batch_sizes", plan.batch_sizes),
        ("seeds", plan.seeds),
        ("tuning.seeds", plan.tuning.seeds or []),
    ):
        if len(set(values)) < len(values):
            yield f"{key}: expected different values, got {values}"
    if plan.warmup_samples is not None and plan.warmup_share is not None:
        yield "warmup_share: give this or warmup_samples, not both"


def _check_tuning(plan: StudyPlan) -> Iterator[str]:
    """Whether learning rates are chosen on what no verdict uses."""
    seeds, metric = plan.tuning.seeds, plan.tuning.metric
    if not plan.sweeps:
        for key, given in (("seeds", seeds), ("metric", metric)):
            if given:
                yield f"tuning.{key}: has no meaning where no arm has several values of {SWEPT}; remove it"
        return
    both = sorted(set(seeds or []) & set(plan.seeds))
    if both:
        yield f"tuning.seeds: expected others than those of seeds, which verdicts use, got {', '.join(map(str, both))}"
    if seeds is not None and len(seeds) == 1:
        yield f"tuning.seeds: expected two or more, which show how sure a choice is, or [], got {seeds}"
    if metric and seeds == []:
        yield "tuning.metric: has no meaning where tuning.seeds is []; remove it"
    shared = sorted({split for one in plan.metrics for split in one.splits} & (metric.splits if metric else set()))
    if shared:
        yield f"tuning.metric: expected a result on a split that no outcome uses, got one on {', '.join(shared)}"


def _check_amounts(plan: StudyPlan) -> Iterator[str]:
    """Whether the margin and the spread are in the outcomes' unit, and a margin that any arm would meet."""
    units = {metric.name: unit_of_keys(metric.keys) for metric in plan.metrics}
    for name in (name for name, unit in units.items() if unit is None):
        yield f"metrics: {name} is the mean of results in different units; give one outcome each"
    unit = next(iter(units.values()))
    if unit is None:
        return
    others = [f"{name} ({found or 'no unit'})" for name, found in units.items() if found not in (unit, None)]
    if others:
        yield f"metrics: one margin decides all outcomes, got {', '.join(others)} beside {unit or 'no unit'}"
    for key, given in (("margin", plan.margin), ("sigma", plan.sigma)):
        if given is None or amount(given)[1] == unit:
            continue
        name, number = plan.metrics[0].name, given.partition(" ")[0]
        if not unit:
            yield f"{key}: {name} has no unit; expected a number alone, such as {number}, got {given}"
        elif unit == POINTS and number == given:
            share = written(float(number), POINTS)
            yield (
                f"{key}: expected a number with its unit, got {given}: '{share}' if that is a share of one, as {name} "
                f"is stored, or '{number} points' if it is hundredths, as tables show it"
            )
        else:
            yield f"{key}: {name} is in {unit}; expected such as '{number} {unit}', got {given}"
    if unit == POINTS == amount(plan.margin)[1] and plan.equal_within >= MOST_OF_EFFECT:
        yield (
            f"margin: expected less than {written(MOST_OF_EFFECT, POINTS)}, half of everything that can be scored, got "
            f"{plan.margin}; name how far two scores may lie apart and still be the same to you"
        )


def _check_ranks(plan: StudyPlan) -> Iterator[str]:
    varied = [(f"axes.{RANKS}", plan.axes.get(RANKS, []))]
    varied += [(f"arms.{arm.name}.axes.{RANKS}", arm.axes.get(RANKS, [])) for arm in plan.arms]
    most = plan.execution.ranks
    for key, values in varied:
        if any(not isinstance(value, int) or isinstance(value, bool) or value < 1 for value in values):
            yield f"{key}: expected numbers of ranks, 1 or more, got {values}"
            return
        most = max([most, *values])
    if most > 1 and plan.execution.launcher == "python":
        yield f"execution.launcher: python starts one rank, got execution.ranks {most}; choose torchrun"
    if plan.execution.jobs > 1 and any(values for _, values in varied):
        yield (
            f"execution.jobs: expected 1 where {RANKS} varies, for cells that share a machine cannot be timed, got "
            f"{plan.execution.jobs}"
        )


def _check_arms(plan: StudyPlan) -> Iterator[str]:
    names = [arm.name for arm in plan.arms]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"arms: {name} is there {names.count(name)} times; give one of them another name, and like: {name}"
    for arm in plan.arms:
        known = arm.like or arm.name
        if known in CONTROLS:
            continue
        if known in ABSENT:
            yield f"arms: {known}: {ABSENT[known]}; the arms there are: {', '.join(CONTROLS)}"
        else:
            hint = did_you_mean(known, CONTROLS) or "; an arm of your own needs like: and words:"
            yield f"arms: no such arm '{known}'{hint} The arms there are: {', '.join(CONTROLS)}"
    if plan.reference.arm not in names:
        yield f"reference.arm: expected one of the arms ({', '.join(names)}), got {plan.reference.arm}"
    for first, second in plan.pairs:
        for named in (first, second):
            if named not in names:
                yield f"pairs: expected two of the arms ({', '.join(names)}), got {named}"
        if first == second:
            yield f"pairs: expected two arms, got {first} twice"


# What the plan says itself; a word would be overruled in silence.
_DERIVED = {
    "seed": "seeds",
    "train.global_batch_size": "batch_sizes",
    "train.samples": "budget",
    "train.epochs": "budget",
    "optimizer.lr_rule": "lr.rule",
    "optimizer.lr_reference_batch": "lr.reference_batch",
}


def _check_words(plan: StudyPlan) -> Iterator[str]:
    recipe = [("words", plan.words), ("axes", tuple(plan.axes))]
    recipe += [(f"arms.{arm.name}", (*arm.words, *arm.axes)) for arm in plan.arms]
    for where, words in recipe:
        for key in dict.fromkeys(word.partition("=")[0] for word in words):
            if key in _DERIVED:
                yield f"{where}: {key} follows from {_DERIVED[key]} of the plan; set that instead"
    execution = [("execution.words", plan.execution.words)]
    execution += [
        (f"execution.words_by_batch.{batch}", words) for batch, words in plan.execution.words_by_batch.items()
    ]
    for where, words in execution:
        for key in dict.fromkeys(word.partition("=")[0] for word in words):
            if key.partition(".")[0] not in ("execution", "checkpoint", "run", "deepspeed"):
                yield f"{where}: {key} is no matter of execution: it belongs into words, where it is part of the recipe"


def _check_budget(plan: StudyPlan) -> Iterator[str]:
    wanted = _BUDGET[plan.held_equal]
    given = [key for key in Budget.model_fields if key != "pilot_steps" and getattr(plan.budget, key) is not None]
    length = [key for key in given if key in wanted]
    allowed = (*wanted, "gib") if plan.held_equal == "memory" else wanted
    if len(length) != 1:
        choice = " or ".join(f"budget.{key}" for key in wanted)
        yield f"budget: held_equal {plan.held_equal} needs exactly one of {choice}, got {', '.join(given) or 'none'}"
    for key in given:
        if key not in allowed:
            yield f"budget.{key}: has no meaning when held_equal is {plan.held_equal}; remove it"
    if plan.held_equal == "grid" and not plan.group_sizes:
        yield "group_sizes: held_equal grid needs them: how many pairs share negatives, such as [128, 512]"
    if plan.held_equal != "grid" and plan.group_sizes:
        yield f"group_sizes: has no meaning when held_equal is {plan.held_equal}; use held_equal: grid"
    for arm in plan.arms if plan.held_equal == "wall_clock" else ():
        if arm.features_of:
            yield (
                f"arms.{arm.name}.features_of: held_equal wall_clock times every arm before the first cell, when there "
                "are no features yet; hold something else equal, or name files that are there"
            )
    if plan.held_equal == "memory" and plan.budget.gib is None:
        yield "budget.gib: held_equal memory needs the peak GiB per rank, got none"


# Each with the keys that it reads: where one of them is wrong, the check would say nothing new.
_CHECKS: tuple[tuple[Callable[[StudyPlan], Iterator[str]], tuple[str, ...]], ...] = (
    (_check_arms, ("arms", "reference", "pairs")),
    (_check_budget, ("held_equal", "budget", "group_sizes", "arms")),
    (_check_words, ("words", "axes", "arms", "execution")),
    (_check_numbers, ("expected", "batch_sizes", "seeds", "tuning", "warmup_samples", "warmup_share")),
    (_check_tuning, ("tuning", "seeds", "metrics", "axes", "arms")),
    (_check_amounts, ("metrics", "margin", "sigma")),
    (_check_ranks, ("axes", "arms", "execution")),
)


def dump_plan(plan: StudyPlan) -> str:
    """The plan with all defaults written out."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)
