"""How long a cell trains: what the plan holds equal, turned into samples.

samples, memory, grid   the same samples for every cell, in whole steps
steps                   the same steps: B times as many samples
compute                 the same useful operations of the encoders: an arm with 1 + omega views of both sides gets
                        1 / (1 + omega) of the samples, one with further texts alone loses no more than its text tower
                        takes; a budget in samples or epochs is that of an arm with one view
wall_clock              the same hours, from samples per second measured on this machine
"""

from collections.abc import Mapping
from math import floor
from typing import Any

from amclr_scale.config.load import build, merge
from amclr_scale.config.schema import Config
from amclr_scale.errors import UserError
from amclr_scale.study.planning.cost import encoder_flops, times_one_view
from amclr_scale.study.planning.plan import StudyPlan

Rates = Mapping[str, float]  # samples per second by setting, such as sogclr-B128-gamma0.6


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


def samples_of(plan: StudyPlan, config: Config, setting: str, epoch: float, rates: Rates, factor: float = 1.0) -> int:
    """Length of a cell in samples, a whole number of steps.

    Args:
        plan: the plan.
        config: the cell's, of any length.
        setting: the cell's name without its seed and a swept learning rate.
        epoch: samples per epoch.
        rates: what was measured here (held_equal wall_clock).
        factor: multiple of the budget that the arm gets.

    Raises:
        UserError: the budget is less than a step, or a rate is needed and not known.
    """
    batch, budget = config.train.global_batch_size, plan.budget
    if plan.held_equal == "steps":
        return batch * max(1, round((budget.steps or 0) * factor))
    wanted = float(budget.samples or (budget.epochs or 0) * epoch)
    match plan.held_equal:
        case "compute" if budget.flops is not None:
            wanted = budget.flops / encoder_flops(config)
        case "compute":
            wanted /= times_one_view(config)
        case "wall_clock":
            if setting not in rates:
                raise UserError(
                    "budget.hours: held_equal wall_clock needs samples per second measured on this machine, and there "
                    "are none; --pilot measures them in a few steps"
                )
            wanted = (budget.hours or 0) * 3600 * rates[setting]
    wanted *= factor
    steps = floor(wanted / batch) if plan.held_equal == "wall_clock" else round(wanted / batch)
    if steps < 1:
        raise UserError(f"budget: {wanted:,.0f} samples are less than one step at a global batch of {batch}")
    return steps * batch
