"""A model from its section of the configuration."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from amclr_scale.config.schema import ImageTower, Model, TextTower
from amclr_scale.encoders.depths import depths
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.freezing import freeze_tower
from amclr_scale.encoders.heads import build_head
from amclr_scale.encoders.image_towers import build_image_tower
from amclr_scale.encoders.recomputation import blocks
from amclr_scale.encoders.start.taken import load_start
from amclr_scale.encoders.taps import build_taps, check_pairs
from amclr_scale.encoders.text_towers import build_text_tower
from amclr_scale.encoders.trial import UntriedError
from amclr_scale.errors import UserError


def build_model(
    model: Model,
    *,
    vocab_size: int,
    pad_id: int,
    context_length: int,
    image_size: int,
    image_mean: tuple[float, float, float],
    image_std: tuple[float, float, float],
    end_id: int | None = None,
    weights: bool = True,
    text_architecture: dict[str, Any] | None = None,
    image_architecture: dict[str, Any] | None = None,
    with_depths: bool = False,
) -> DualEncoder:
    """Two towers and their heads. Initial weights follow torch's global generator: seed it before.

    Args:
        vocab_size, pad_id, end_id: the tokenizer's; end_id matters only where it is also what pads.
        context_length: L, tokens per caption.
        image_size: side of the images in pixels.
        image_mean, image_std: per channel, of images in [0, 1].
        weights: load those that the configuration names; False: leave every weight random, to look at sizes alone.
        with_depths: find out how deep each parameter is (encoders/depths.py), for optimizer.layer_decay.
        text_architecture, image_architecture: the config.json of a tower of transformers, instead of the one that its
            name says.

    Raises:
        UserError: names the key to change; nothing was downloaded.
    """
    by_tower = weights and model.init is None  # which has the weights of both
    image_tower, image_width, notes, place = build_image_tower(
        model.image,
        image_size,
        weights=by_tower,
        architecture=image_architecture,
        started=model.init is not None,
    )
    text_tower, text_width = build_text_tower(
        model.text,
        vocab_size=vocab_size,
        pad_id=pad_id,
        end_id=end_id,
        context_length=context_length,
        weights=by_tower,
        architecture=text_architecture,
    )
    built = DualEncoder(
        image_tower,
        build_head(model.image.projection, image_width, model.embedding_width, model.image.dropout),
        text_tower,
        build_head(model.text.projection, text_width, model.embedding_width, model.text.dropout),
        temperature=model.temperature,
        logit_bias=model.logit_bias,
        image_mean=image_mean,
        image_std=image_std,
        image_tokens=place,
        notes=(*notes, *unread(model.image, "image"), *unread(model.text, "text"), *_random_and_frozen(model)),
    )
    built.widths = {"image": image_width, "text": text_width}
    if weights and model.init is not None:
        built.notes += tuple(load_start(built, model.init))
    examples: dict[Literal["image", "text"], Callable[[], torch.Tensor]] = {
        "image": lambda: torch.zeros(2, 3, image_size, image_size),
        "text": lambda: torch.full((2, context_length), int(pad_id == 0)),
    }
    for side, example in examples.items():
        tower, head, section = (getattr(owner, name) for owner, name in (
            (built, f"{side}_tower"), (built, f"{side}_head"), (model, side)
        ))  # fmt: skip
        taps = (
            build_taps(tower, section, side=side, example=example(), embedding_width=model.embedding_width)
            if section.taps
            else None
        )
        if taps is not None:
            built.taps[side] = taps
        kept = freeze_tower(tower, head, section, key=f"model.{side}", example=example)
        if kept is not None:
            built.kept[side] = kept
        if with_depths and not blocks(tower):
            built.notes += (f"optimizer.layer_decay: {section.name} has no blocks: all of it learns at one rate",)
        elif with_depths:
            try:
                built.depths |= {f"{side}_tower.{name}": depth for name, depth in depths(tower, example()).items()}
            except UntriedError as error:
                raise UserError(
                    f"optimizer.layer_decay: {section.name} cannot be looked at without its weights; expected 1"
                ) from error
    check_pairs(built.taps_of("image"), built.taps_of("text"))
    built.train()
    return built


def _random_and_frozen(model: Model) -> list[str]:
    image_random = model.image.weights is None and not model.image.pretrained
    found = {"image": ("weights", image_random), "text": ("pretrained", not model.text.pretrained)}
    return [
        f"model.{side}.frozen: this tower keeps the random weights that it begins with; model.{side}.{key} names others"
        for side, (key, random) in found.items()
        if random and model.init is None and getattr(model, side).frozen
    ]


def unread(tower: ImageTower | TextTower, side: Literal["image", "text"]) -> Iterator[str]:
    """One line about the keys that were changed and that a tower of this name does not read.

    Whose a key is says its description: `small_transformer: width.`
    """
    kind = tower.name.partition("/")[0]
    keys: dict[str, list[str]] = {}
    for key, field in type(tower).model_fields.items():
        owner, colon, _ = (field.description or "").partition(": ")
        of_another = colon and " " not in owner and owner.partition("/")[0] != kind
        if of_another and getattr(tower, key) != field.default:
            keys.setdefault(owner, []).append(f"model.{side}.{key}")
    for owner, changed in keys.items():
        yield f"{', '.join(changed)}: read by {owner} only, not by {tower.name}"
