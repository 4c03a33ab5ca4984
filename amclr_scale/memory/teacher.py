"""What a teacher holds (engine/teacher.py): its weights all the time, and what it needs while it encodes a batch.

    weights      4 bytes a trained parameter; at stage 3 of this rank's share
    while it encodes, at stages 0 to 2 a copy in the towers' precision where that is not fp32, at stage 3 the shares of
                 the student's weights, which its own lie in place of; forwards of micro-batches without graph, one at a
                 time; their features, and once more while they are joined
    from then on, until the step is done, its features

`order: first` does so while no graph is alive; `last` beside the graphs that the student's first pass has kept. Towers
are traced in training mode: what dropout makes there, the teacher does not make.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import Side, lends_layers, lent_sides
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.memory.components import TEACHER, Component, Phase, Place, always
from amclr_scale.memory.passes import Moment, Passes, runs_of
from amclr_scale.memory.towers import input_sizes, trace
from amclr_scale.precision import DTYPES

WIDE = 4  # bytes of an element of a feature, and of a kept weight


def computes_in(config: Config) -> str:
    """The precision of a teacher's forward."""
    momentum = config.model.momentum
    return config.execution.precision if momentum is None or momentum.precision == "run" else momentum.precision


def encodes(config: Config) -> Config:
    """The configuration of a teacher's forward: one view of each sample, no parts of an objective."""
    data = config.data.model_copy(update={"image_views": 0, "text_views": 0, "image_negatives": 0, "text_negatives": 0})
    execution = config.execution.model_copy(update={"precision": computes_in(config)})
    return config.model_copy(update={"data": data, "execution": execution, "objective": {"name": "clip"}})


@dataclass(frozen=True)
class Weights:
    """What the formulas need of the parameters.

    Attributes:
        numel: elements of trained parameters, with padding; at stage 3 of this rank's shares.
        buffers: bytes of the model's buffers.
        aside: where the optimizer works.
    """

    numel: int
    buffers: int
    aside: Place


def teacher_components(config: Config, plan: Plan, device: str, weights: Weights, passes: Passes) -> list[Component]:
    """Everything above.

    Args:
        device: cpu or cuda.
    """
    if config.model.momentum is None:
        return []
    cut, knob = config.execution.zero_stage == 3, "model.momentum: null"
    place: Place = weights.aside if cut else "device"
    found = [
        Component("moving average", always(WIDE * weights.numel), knob, "state", place),
        Component("buffers of the moving average", always(weights.buffers), knob, "state"),
    ]
    if not (sides := lent_sides(config)):
        return found
    first = config.model.momentum.order == "first"
    after = Moment() if first else passes.after_first_pass
    features = plan.local_batch_size * sum(_row(config, side) for side in sides)
    worst = max(_moments(config, plan, device, sides, after, features), key=lambda moment: moment.total)
    item, student = DTYPES[computes_in(config)].itemsize, DTYPES[config.execution.precision].itemsize
    copy = student * weights.numel if cut else item * weights.numel if item != WIDE else 0
    gathered = max((whole for whole in passes.gathered_in_first_pass), default=0) if cut else 0
    later: list[Phase] = ["objective", "pass_2", "reduce", "optimizer", *(["pass_1"] if first else [])]  # type: ignore[list-item]
    smaller = "execution.micro_batch_size: a smaller one"
    order = "" if first else "model.momentum.order: first, or "
    return [
        *found,
        Component("weights while the teacher computes", {TEACHER: copy + weights.buffers}, knob, "state"),
        Component("gathered parameters of the teacher", {TEACHER: gathered}, knob, "state"),
        Component(
            "activations beside and in the teacher", {TEACHER: worst.image + worst.text}, order + smaller, "activations"
        ),
        Component(
            "features of the teacher", {**dict.fromkeys(later, features), TEACHER: worst.features},
            "train.global_batch_size over more ranks", "features",
        ),
    ]  # fmt: skip


def _moments(
    config: Config, plan: Plan, device: str, sides: tuple[Side, ...], now: Moment, features: int
) -> Iterator[Moment]:
    """One micro-batch after another, and all features joined."""
    cut = config.execution.zero_stage == 3 and plan.world_size > 1
    towers = {side: trace(encodes(config), side, device, partitioned=cut).without_graph for side in sides}
    row = {side: _row(config, side) for side in sides}
    yield now.and_also(features=2 * features)
    for call, count in runs_of(plan):
        lent = [(side, m) for side, m in call if side in sides]
        now = now.and_also(
            features=max(0, count - 1) * sum(row[side] * m for side, m in lent)
        )  # all but the last of them
        for side, m in lent:
            yield now.at(side, towers[side].forward_peak(m))
            now = now.and_also(features=row[side] * m)


def _row(config: Config, side: Side) -> int:
    """Bytes of what it lends of a sample."""
    layers = input_sizes(config) if lends_layers(config) else {}
    of_side = sum(width for name, width in layers.items() if name.startswith(f"{side}_layers."))
    return WIDE * (config.model.embedding_width + of_side)
