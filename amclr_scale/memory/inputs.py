"""What batches and what rests beside them take: on the host, on their way, and on the device."""

import math

from amclr_scale.config import schema
from amclr_scale.config.schema import Config
from amclr_scale.config.teacher import lent_sides
from amclr_scale.data.augmentation.on_device import AT_ONCE, held_for_a_moment
from amclr_scale.data.augmentation.plans import most_operations
from amclr_scale.data.augmentation.shipping import COLUMNS, MOST_SENT
from amclr_scale.data.beside.features import sides_of
from amclr_scale.data.beside.references import reference_widths
from amclr_scale.encoders.resting import RestingTower
from amclr_scale.engine.batch_plan import Plan
from amclr_scale.memory.components import TEACHER, Component, Phase, Place, always
from amclr_scale.memory.towers import skeleton
from amclr_scale.precision import DTYPES

PART = 64  # samples that a worker makes at a time (data/loader.py)


def input_components(config: Config, plan: Plan, device: str) -> list[Component]:
    """Batches: the one in use and the next one while it is made; parts that workers make ahead; towers at rest."""
    data, workers, b = config.data, config.execution.workers, plan.local_batch_size
    images, texts = [3 * data.image_size**2] * data.images_each, [8 * data.context_length] * data.texts_each
    item = DTYPES[config.execution.precision].itemsize
    for side in sides_of(data):  # features in place of what would be encoded
        side_of = images if side == "image" else texts
        side_of[:] = [item * skeleton(config).widths[side]] * len(side_of)
    given = _given(config)
    others = texts + [8] * (2 if data.image_id else 1) + list(given.values())  # ids, and what no tower reads
    made_there = "image" not in sides_of(data) and "device" in (data.resident, data.augment_on)
    from_host = [_sent(data), *others] if made_there else images + others
    batch, host = b * sum(images + others), b * sum(from_host)
    knob = "train.global_batch_size over more ranks"
    if device == "cuda":
        # Pinned memory comes in powers of two and is kept for reuse: that of the batch in use and of the next one.
        pinned = 2 * sum(1 << (b * size - 1).bit_length() for size in from_host)
        always_there = pinned + host if workers else pinned  # whose parts a thread joins, beside training
        found = [Component("batch", {**always(always_there), "data": pinned + host}, knob, "input", "host")]
    else:
        made = 2 if b > PART else 1  # in parts, and joined
        found = [Component("batch", {**always(batch), "data": batch + made * host}, knob, "input", "device")]
    if made_there:
        views, moment = b * sum(images), held_for_a_moment(b, data.image_size)
        sent = min(b, PART + AT_ONCE // max(1, _sent(data))) * _sent(data)  # of the batch's groups of parts, one
        whole = always(views) if device == "cuda" else {}
        by_phase = {**whole, "data": (2 if device == "cuda" else 1) * views + sent + moment}
        found.append(Component("views made on the device", by_phase, knob, "input"))
    if sides_of(data):
        rests = sum(tower.bytes for tower in skeleton(config).children() if isinstance(tower, RestingTower))
        place: Place = "host" if device == "cuda" else "device"
        found.append(Component("towers at rest", always(rests), "fewer ranks on a node", "state", place))
    if workers:
        per_worker = math.ceil(math.ceil(b / PART) / workers)
        ahead = always(max(2, per_worker) * workers * min(PART, b) * sum(from_host))
        found.append(Component("parts made ahead", ahead, "execution.workers: fewer", "input", "host"))
    if device == "cuda":
        there = made_there and not config.execution.trim_texts  # a part of what lies there needs no copy
        found += _copied(config, plan, [] if there else images, texts, sum(given.values()))
    return found


def _copied(config: Config, plan: Plan, images: list[int], texts: list[int], given: int) -> list[Component]:
    """What a GPU gets of the host's batch, of which these are bytes for each sample."""
    rows_of_images, rows_of_texts = plan.micro_batch_sizes
    two = 2 if plan.micro_batches > 1 else 1  # the next one is on its way
    encoded = two * (rows_of_images * sum(images) + rows_of_texts * sum(texts))
    sides = lent_sides(config)
    lent = sum(images[:1]) * rows_of_images * ("image" in sides) + texts[0] * rows_of_texts * ("text" in sides)
    by_phase: dict[Phase, int] = {"pass_1": encoded, "pass_2": encoded, TEACHER: two * lent}
    beside: tuple[Phase, ...] = ("objective", "pass_2", "reduce", "optimizer")
    of_all = dict.fromkeys(beside, plan.local_batch_size * given)
    return [
        Component("labels, references and masks", of_all, "train.global_batch_size over more ranks", "input"),
        Component("micro-batches on the device", by_phase, "execution.micro_batch_size", "input"),
    ]


def _sent(data: schema.Data) -> int:
    """Bytes, at most, of what a worker sends of a sample's pictures where the device makes their views."""
    of_base = data.image_views if data.image_view_from == "base" else 0
    pixels = 0 if data.resident == "device" else MOST_SENT * (data.images_each - of_base) * data.image_size**2
    steps = max(most_operations(recipe) for recipe in (data.augmentation, data.image_view or data.augmentation))
    return 3 * pixels + 8 * (COLUMNS + 3 * steps) * data.images_each


def _given(config: Config) -> dict[str, int]:
    """Bytes for each sample of what goes to the objective as the loader gives it."""
    data, (widths, unknown) = config.data, reference_widths(config.data)
    found = {name: 4 * width for name, width in widths.items()}
    found |= dict.fromkeys(unknown, 4 * config.model.embedding_width)
    hard = {"image_negative_mask": data.image_negatives, "text_negative_mask": data.text_negatives}
    found |= {name: K for name, K in hard.items() if K}
    return found | ({"labels": 8} if data.labels else {})
