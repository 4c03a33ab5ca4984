"""Whether samples have the captions that a recipe asks of them, told before training."""

import numpy as np

from amclr_scale.config import schema
from amclr_scale.data.decoding import BadSampleError, Field
from amclr_scale.data.pipeline import Pipeline
from amclr_scale.errors import UserError

LOOKED_AT = 64  # samples, spread evenly over the data set
OFTEN = 0.05  # share of repeated views above which the log says so


def check_further_captions(pipeline: Pipeline, data: schema.Data, seed: int) -> list[str]:
    """Notes for the log about captions that some samples do not have. Reads samples, so only of shards at hand.

    A sample without a further caption shows its first one again: an objective over views then compares a text with
    itself, and nothing looks wrong.

    Raises:
        UserError: no sample that was looked at has a further caption that differs from its first.
    """
    text, total = pipeline.text, pipeline.index.num_samples
    repeated = same = looked_at = 0
    labelled = grouped = with_negatives = with_pictures = 0
    having = dict.fromkeys((*text.base[1:], *text.further), 0)
    for sample in np.unique(np.linspace(0, total - 1, LOOKED_AT).astype(int)).tolist():
        try:
            content = pipeline.read(sample)
            captions = [] if "text" in pipeline.features else text.draw(content, seed, 0, sample)
            labelled += pipeline.label_of(content) >= 0
            grouped += pipeline.group_of(content) is not None
            with_negatives += any(pipeline.hard.draw(captions[0], content, seed, 0, sample) if captions else ())
            with_pictures += bool(pipeline.hard_pictures.there(content))
            for place in having:
                having[place] += bool(content.captions(place, optional=True))
        except BadSampleError:
            continue
        looked_at += 1
        repeated += len({*captions}) < len(captions)
        same += len({*captions}) == 1
    if not looked_at:
        return []  # training will tell what is wrong with them
    if data.labels and not labelled:
        raise UserError(
            f"data.labels: expected a place where samples say their class, got {data.labels}: none of {looked_at} "
            "samples looked at has anything there"
        )
    if data.image_view_from == "group" and not grouped:
        raise UserError(
            f"data.image_group: expected a place where samples say what they show, got {data.image_group}: none of "
            f"{looked_at} samples looked at has a word or a whole number there"
        )
    if data.text_negatives and not with_negatives:
        raise UserError(
            f"data.text_negative: expected rules or places that give wrong captions, got {data.text_negative}: they "
            f"give none for {looked_at} samples looked at"
        )
    if data.image_negatives and not with_pictures:
        raise UserError(
            f"data.image_negative: expected members with further pictures of samples, got {data.image_negative}: none "
            f"of {looked_at} samples looked at has one"
        )
    missing = [place for place, count in having.items() if not count]
    asked = data.text_view != schema.Data().text_view
    if text.further and asked and all(place in missing for place in text.further):
        raise UserError(
            f"data.text_view: expected a place where samples have captions, got {_listed(text.further)}: none of "
            f"{looked_at} samples looked at has one there"
        )
    if text.further and same == looked_at:
        raise UserError(repeats(looked_at, text.further))
    notes = [f"data: none of {looked_at} samples looked at has a caption at {place}" for place in missing if asked]
    if text.further and repeated > OFTEN * looked_at:
        notes.append(
            f"data: {repeated / looked_at:.0%} of {looked_at} samples looked at have too few captions for "
            f"data.text_views={data.text_views} at {_listed(text.further)}: their views repeat a text"
        )
    return notes


def repeats(samples: int, places: list[Field]) -> str:
    """What to say where all further captions of so many samples repeat."""
    return (
        f"data.text_views: expected further captions, those of all {samples:,} samples looked at repeat the first one; "
        f"data.text_view says where they are (now {_listed(places)}), data.text_augmentation changes words, "
        "amclr-scale shards paraphrase makes others"
    )


def _listed(places: list[Field]) -> str:
    return " or ".join(map(str, places))
