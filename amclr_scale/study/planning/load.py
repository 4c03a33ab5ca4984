"""From a YAML file and `key=value` words to a checked plan: every mistake in one answer, the key first.

A plan may name another plan in `base:` and then holds differences only. Imports no torch.
"""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from pydantic import ValidationError

from amclr_scale.config.load import from_words, merge, mistakes, read_file
from amclr_scale.config.shipped import find
from amclr_scale.errors import UserError
from amclr_scale.study.planning.arms import ABSENT, CONTROLS
from amclr_scale.study.planning.plan import RANKS, Budget, StudyPlan


def load_plan(path: Path, words: Sequence[str] = ()) -> StudyPlan:
    """Read a plan, put `key=value` words over it, check what can be checked without the configuration.

    Raises:
        UserError: one line per mistake, all of them, the key first.
    """
    path = find(path, "studies")
    tree = merge(read_file(path, argument="PLAN"), from_words(words))
    tree.setdefault("name", path.stem)
    if isinstance(tree.get("arms"), list):
        tree["arms"] = [{"name": arm} if isinstance(arm, str) else arm for arm in tree["arms"]]
    if isinstance(tree.get("config"), str):
        tree["config"] = str((path.parent / tree["config"]).resolve())
    try:
        plan = StudyPlan.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(mistakes(error, root=StudyPlan))) from error
    lines = list(_check(plan))
    if lines:
        raise UserError("\n".join(lines))
    return plan


_BUDGET = {
    "samples": ("samples", "epochs"),
    "steps": ("steps",),
    "compute": ("flops", "samples", "epochs"),
    "wall_clock": ("hours",),
    "memory": ("samples", "epochs"),
    "grid": ("samples", "epochs"),
}


def _check(plan: StudyPlan) -> Iterator[str]:
    """Mistakes that no single key shows."""
    yield from _check_arms(plan)
    yield from _check_budget(plan)
    yield from _check_words(plan)
    if plan.expected and (plan.expected.device is None) == (plan.expected.samples_per_second is None):
        yield "expected: needs exactly one of expected.device and expected.samples_per_second"
    for key, values in (("batch_sizes", plan.batch_sizes), ("seeds", plan.seeds)):
        if len(set(values)) < len(values):
            yield f"{key}: expected different values, got {values}"
    if plan.warmup_samples is not None and plan.warmup_share is not None:
        yield "warmup_share: give this or warmup_samples, not both"
    yield from _check_ranks(plan)


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
            yield f"arms: {known}: {ABSENT[known]} yet; the arms there are: {', '.join(CONTROLS)}"
        else:
            near = difflib.get_close_matches(known, CONTROLS, n=1, cutoff=0.6)
            hint = f"did you mean '{near[0]}'?" if near else "an arm of your own needs like: and words:"
            yield f"arms: no such arm '{known}'; {hint} The arms there are: {', '.join(CONTROLS)}"
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
    if plan.held_equal == "memory" and plan.budget.gib is None:
        yield "budget.gib: held_equal memory needs the peak GiB per rank, got none"


def dump_plan(plan: StudyPlan) -> str:
    """The plan with all defaults written out."""
    return yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, width=110, allow_unicode=True)
