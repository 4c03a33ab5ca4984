"""What batches and what rests beside them take: on the host, on their way, and on the device."""

import math

from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import lent_sides
from amclr_scale.data.beside.features import sides_of
from amclr_scale.data.beside.references import reference_widths
from amclr_scale.encoders.resting import RestingTower
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.memory.components import TEACHER, Component, Phase, always
from amclr_scale.memory.towers import skeleton
from amclr_scale.precision import DTYPES

PART = 64  # samples that a worker makes at a time (data/loader.py)


def input_components(config: Config, plan: Plan, device: str) -> list[Component]:
    """Batches: the one in use and the next one while it is made; parts that workers make ahead; towers at rest."""
    data, workers, b = config.data, config.execution.workers, plan.local_batch_size
    tensors = [3 * data.image_size**2] * data.images_each + [8 * data.context_length] * data.texts_each
    item = DTYPES[config.execution.precision].itemsize
    for side in sides_of(data):  # features in place of what would be encoded
        first, end = (0, data.images_each) if side == "image" else (data.images_each, len(tensors))
        tensors[first:end] = [item * skeleton(config).widths[side]] * (end - first)
    image, text = (sum(size) for size in (tensors[: data.images_each], tensors[data.images_each :]))
    made_there = "image" not in sides_of(data) and "device" in (data.resident, data.augment_on)
    given = _given(config)
    tensors += [8] * (2 if data.image_id else 1) + list(given.values())  # ids, and what no tower reads
    row = sum(tensors)
    batch = b * row
    knob = "train.global_batch_size over more ranks"
    if device == "cuda":
        # Pinned memory comes in powers of two and is kept for reuse: that of the batch in use and of the next one.
        pinned = 2 * sum(1 << (b * size - 1).bit_length() for size in tensors)
        found = [Component("batch", {**always(pinned), "data": pinned + batch}, knob, "input", "host")]
    else:
        made = 2 if b > PART else 1  # in parts, and joined
        found = [Component("batch", {**always(batch), "data": (1 + made) * batch}, knob, "input", "device")]
    if sides_of(data):
        rests = sum(tower.bytes for tower in skeleton(config).children() if isinstance(tower, RestingTower))
        knob_of_towers = "fewer ranks on a node"
        found.append(
            Component(
                "towers at rest", always(rests), knob_of_towers, "state", "host" if device == "cuda" else "device"
            )
        )
    if workers:
        per_worker = math.ceil(math.ceil(b / PART) / workers)
        parts = max(2, per_worker) * workers
        ahead = always(parts * min(PART, b) * row)
        found.append(Component("parts made ahead", ahead, "execution.workers: fewer", "input", "host"))
    if device == "cuda":
        images, texts = plan.micro_batch_sizes
        two = 2 if plan.micro_batches > 1 else 1  # the next one is on its way
        inputs: dict[Phase, int] = dict.fromkeys(("pass_1", "pass_2"), two * (images * image + texts * text))
        beside: tuple[Phase, ...] = ("objective", "pass_2", "reduce", "optimizer")
        found.append(
            Component("labels, references and masks", dict.fromkeys(beside, b * sum(given.values())), knob, "input")
        )
        sides = lent_sides(config)
        lent = tensors[0] * images * ("image" in sides) + tensors[data.images_each] * texts * ("text" in sides)
        found.append(
            Component(
                "micro-batches on the device", {**inputs, TEACHER: two * lent}, "execution.micro_batch_size", "input"
            )
        )
    return found


def _given(config: Config) -> dict[str, int]:
    """Bytes for each sample of what goes to the objective as the loader gives it."""
    data, (widths, unknown) = config.data, reference_widths(config.data)
    found = {name: 4 * width for name, width in widths.items()}
    found |= dict.fromkeys(unknown, 4 * config.model.embedding_width)
    hard = {"image_negative_mask": data.image_negatives, "text_negative_mask": data.text_negatives}
    found |= {name: K for name, K in hard.items() if K}
    return found | ({"labels": 8} if data.labels else {})
