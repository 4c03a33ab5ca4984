"""Which cells a plan has, and the words that make each of them: arms, axes, batch sizes in words."""

import itertools
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel

from amclr_scale.config.data_checks import READ_BY
from amclr_scale.config.load import from_words, merge
from amclr_scale.config.objective_options import declared, find
from amclr_scale.config.schema import Data, Optimizer
from amclr_scale.declarations import unread_keys
from amclr_scale.errors import UserError
from amclr_scale.study.planning.arms import CONTROLS
from amclr_scale.study.planning.plan import SWEPT, ArmPlan, Role, StudyPlan


def variant_name(arm: str, batch: int, axes: Mapping[str, Any]) -> str:
    """Such as sogclr-B128-gamma0.6, or sogclr-B128-adamp where the axis is a name."""
    parts = [f"{key.rpartition('.')[2].removesuffix('name')}{_plain(value)}" for key, value in axes.items()]
    return "-".join([arm, f"B{batch}", *parts])


class Combination(NamedTuple):
    """What one cell varies.

    Attributes:
        setting: its variant without a swept learning rate, under which one is chosen.
        waits: its learning rate is not chosen yet.
    """

    batch: int
    axes: dict[str, Any]
    seed: int
    role: Role
    setting: str
    waits: bool


def setting_name(arm: str, batch: int, axes: Mapping[str, Any]) -> str:
    """The variant's name without a swept learning rate."""
    return variant_name(arm, batch, without_rate(axes))


def without_rate(axes: Mapping[str, Any]) -> dict[str, Any]:
    """The axes that make it another method."""
    return {key: value for key, value in axes.items() if key != SWEPT}


def combinations(
    plan: StudyPlan, arm: ArmPlan, tree: Mapping[str, Any], chosen: Mapping[str, float]
) -> Iterator[Combination]:
    """All batch sizes, axis values and seeds; options that the arm's objective does not have are left out.

    Args:
        chosen: learning rates by setting, as tuning chose them.
    """
    objective = find(merge(dict(tree), from_words(words_of(plan, arm, 0, check=False)))["objective"])
    options, in_groups = objective.options.model_fields, objective.declarations.group_option
    groups = f"objective.{in_groups}"

    def applies(key: str) -> bool:
        return not key.startswith("objective.") or key.removeprefix("objective.") in options

    axes = {key: values for key, values in plan.axes.items() if applies(key)} | arm.axes
    for batch in arm.batch_sizes or plan.batch_sizes:
        sizes = [size for size in plan.group_sizes if size <= batch] if in_groups else []
        grid = {groups: sizes} if plan.held_equal == "grid" and sizes and groups not in axes else {}
        values = itertools.product(*axes.values(), *grid.values())
        every = [dict(zip([*axes, *grid], one, strict=True)) for one in values]
        if len(axes.get(SWEPT, [])) < 2 or not plan.tuning_seeds:
            for one, seed in itertools.product(every, plan.seeds):
                yield Combination(batch, one, seed, "scored", setting_name(arm.name, batch, one), False)
            continue
        for one, seed in itertools.product(every, plan.tuning_seeds):
            yield Combination(batch, one, seed, "tuning", setting_name(arm.name, batch, one), False)
        for setting, one in {setting_name(arm.name, batch, one): one for one in every}.items():
            rate = chosen.get(setting)
            fixed = without_rate(one) if rate is None else one | {SWEPT: rate}
            for seed in plan.seeds:
                yield Combination(batch, fixed, seed, "scored", setting, rate is None)


def words_of(plan: StudyPlan, arm: ArmPlan, batch: int, *, check: bool = True) -> list[str]:
    """An arm's words; with `check`, its batch sizes put in.

    Raises:
        UserError: a batch size is not divisible as a word asks.
    """
    words = (*CONTROLS[arm.like or arm.name].words, *arm.words)
    return [_batch_sizes(word, batch, min(plan.batch_sizes)) for word in words] if check else list(words)


def _batch_sizes(word: str, batch: int, smallest: int) -> str:
    """`B`, `B/k` and `smallest` as numbers.

    Raises:
        UserError: k does not divide B.
    """
    key, _, value = word.partition("=")
    if value == "smallest":
        return f"{key}={smallest}"
    found = re.fullmatch(r"B(?:/([1-9]\d*))?", value)
    if not found:
        return word
    divisor = int(found[1] or 1)
    if batch % divisor:
        raise UserError(f"batch_sizes: expected multiples of {divisor}, for {word}, got {batch}")
    return f"{key}={batch // divisor}"


def kept_settings(tree: Mapping[str, Any], words: Sequence[str]) -> list[str]:
    """The shared settings of the optimizer, for a cell that names another one: a changed name would drop them."""
    optimizer = tree.get("optimizer", {})
    name = from_words(words).get("optimizer", {}).get("name")
    if name is None or name == optimizer.get("name", Optimizer().name):
        return []
    return [f"optimizer.{key}={json.dumps(value)}" for key, value in optimizer.items() if key != "name"]


def _plain(value: Any) -> str:
    """A value as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "_", f"{value:g}" if isinstance(value, float) else str(value)).strip("_")


def further_views(tree: Mapping[str, Any]) -> list[str]:
    """Words for as many further views as the objective reads, where the sections say another number.

    And for no labels and features where they name some that it does not read.
    """
    inputs, data = declared(tree["objective"]).inputs, tree.get("data", {})
    wanted = {key: inputs.count(key) for key in dict.fromkeys(READ_BY.values())}
    words = [f"data.{key}={count}" for key, count in wanted.items() if data.get(key, 0) != count]
    return words + _as_if_unsaid(unread_keys(inputs), data)


def without_places(tree: Mapping[str, Any], named: Container[str]) -> list[str]:
    """Words that take back what a base says, for all arms, of views and negatives of which this one has none.

    Args:
        tree: the sections of a cell.
        named: keys that the arm itself says, which stay.
    """
    data = tree.get("data", {})
    unread = [key for key, number in READ_BY.items() if not data.get(number) and f"data.{key}" not in named]
    return _as_if_unsaid(unread, data)


def _as_if_unsaid(keys: Iterable[str], data: Mapping[str, Any]) -> list[str]:
    words = []
    for key in keys:
        default = Data.model_fields[key].default
        plain = json.dumps(default.model_dump(mode="json") if isinstance(default, BaseModel) else default)
        if key in data and json.dumps(data[key]) != plain:
            words.append(f"data.{key}={plain}")
    return words
