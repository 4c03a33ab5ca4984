"""Dual encoders saved by transformers: pictures and captions as their saved processor and tokenizer make them.

Captions get the special tokens that the tokenizer adds, as many positions as the model has (or the tokenizer says), and
a mask where the tokenizer gives one. SigLIP's family was trained without a mask, on captions that are always filled up.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from amclr_scale.config.schema import Config
from amclr_scale.data.augmentation.pictures import Picture
from amclr_scale.data.reading import Reading
from amclr_scale.data.tokenizers import well_formed
from amclr_scale.encoders.libraries.transformers_parts import read_folder
from amclr_scale.encoders.start.of_transformers import pixel_statistics
from amclr_scale.encoders.trial import UntriedError, largest, trial
from amclr_scale.errors import UserError
from amclr_scale.evaluation.foreign.model import (
    CAPTIONS,
    Foreign,
    foreign_config,
    in_eight_bits,
    proof_picture,
    prove,
    unit,
)

LONGEST = 512  # positions that are asked for where neither model nor tokenizer says how many there are


def open_transformers(name: str, folder: Path) -> tuple[Foreign, Config, Reading]:
    """The model in a folder, and how it reads.

    Raises:
        UserError: the folder holds no dual encoder with its tokenizer and image processor, or one whose encoding
            cannot be reproduced.
    """
    inner, tokenizer, processor = _parts(name, folder)
    text = inner.config.get_text_config()
    always_filled = "siglip" in inner.config.model_type
    context = _context(inner, tokenizer, text)
    captions = _Captions(tokenizer, context, masked=not always_filled)
    pictures = _Pictures(name, processor)
    mean, std = pixel_statistics(processor)
    model = Foreign(inner, _ImageFeatures(inner), _TextFeatures(inner), mean, std)
    reading = Reading(captions, pictures)
    prove(name, "transformers", model, reading, _want(inner, tokenizer, processor, context, always_filled))
    return model, foreign_config(str(folder), context, reading.blank.shape[-1], mean, std), reading


def _parts(name: str, folder: Path) -> tuple[Any, Any, Any]:
    """Model, tokenizer, image processor."""
    if not (folder / "config.json").is_file():
        raise UserError(f"checkpoint: expected a folder saved by transformers, got {name}: it has no config.json")
    found, tokenizer, processor = read_folder(folder, key="checkpoint", model=True)
    inner = found.float().eval()  # the library keeps the type that a folder was saved in
    if not hasattr(inner, "get_image_features") or not hasattr(inner, "get_text_features"):
        raise UserError(f"checkpoint: expected a dual encoder such as CLIP, got {type(inner).__name__} in {name}")
    return inner, tokenizer, processor


class _TextFeatures(nn.Module):
    """Ids, of which negative ones are hidden from attention (-1 - id), -> (b, D)."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, rows: Tensor) -> Tensor:
        visible = rows >= 0
        ids = torch.where(visible, rows, -1 - rows)
        mask = {} if bool(visible.all()) else {"attention_mask": visible.long()}
        return _tensor(self.inner.get_text_features(input_ids=ids, **mask))


class _ImageFeatures(nn.Module):
    """Normalised pixels -> (b, D)."""

    def __init__(self, inner: Any):
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        return _tensor(self.inner.get_image_features(pixel_values=pixels))


class _Captions:
    """Captions -> (n, L) int64, positions that the tokenizer's mask hides as -1 - id."""

    def __init__(self, tokenizer: Any, length: int, *, masked: bool):
        self.tokenizer, self.length, self.masked = tokenizer, length, masked

    def __call__(self, captions: Sequence[str] | str) -> Tensor:
        listed = [captions] if isinstance(captions, str) else list(captions)
        found = self.tokenizer(
            [well_formed(text) for text in listed],
            padding="max_length", truncation=True, max_length=self.length, return_tensors="pt",
        )  # fmt: skip
        ids: Tensor = found["input_ids"]
        if not self.masked or "attention_mask" not in found:
            return ids
        return torch.where(found["attention_mask"].bool(), ids, -1 - ids)


class _Pictures:
    """A picture -> (3, H, W), resized and cut by the saved processor, which is kept from normalising."""

    def __init__(self, name: str, processor: Any):
        self.name, self.processor = name, processor

    def __call__(self, picture: Picture) -> Tensor:
        found = self.processor(images=picture, do_rescale=False, do_normalize=False, return_tensors="pt")
        if further := sorted(set(found) - {"pixel_values"}):
            raise UserError(
                f"checkpoint: {self.name}: {type(self.processor).__name__} gives {', '.join(further)} beside pixels; "
                "this kind of model cannot be evaluated here"
            )
        pixels: Tensor = found["pixel_values"][0]
        return in_eight_bits(pixels)


def _context(inner: Any, tokenizer: Any, text: Any) -> int:
    """The most tokens of a caption."""
    said = (tokenizer.model_max_length, getattr(text, "max_position_embeddings", None) or LONGEST)
    word = next((i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids), 0)
    features = _TextFeatures(inner)

    def fits(length: int) -> bool:
        try:
            trial(features, torch.full((1, length), word))
        except UntriedError:
            return True
        except Exception:  # whatever a model raises about a caption that is too long
            return False
        return True

    most = int(min(said))
    return most if fits(most) else largest(fits, most)


@torch.no_grad()
def _want(inner: Any, tokenizer: Any, processor: Any, context: int, always_filled: bool) -> dict[str, Tensor]:
    """What transformers makes of the proof's picture and captions."""
    padding = "max_length" if always_filled else True
    texts = tokenizer(CAPTIONS, padding=padding, truncation=True, max_length=context, return_tensors="pt")
    if always_filled:
        texts.pop("attention_mask", None)
    texts.pop("token_type_ids", None)  # all zero, as they are without
    pixels = processor(images=proof_picture(), return_tensors="pt")
    try:
        out = inner(**texts, **pixels)
        image, text = out.image_embeds, out.text_embeds
    except Exception as error:  # some cannot be called with two captions for one picture, or give no features
        logging.getLogger(__name__).debug("%s: %s", type(inner).__name__, error)
        image, text = inner.get_image_features(**pixels), inner.get_text_features(**texts)
    return {"image": unit(_tensor(image)), "text": unit(_tensor(text))}


def _tensor(output: Any) -> Tensor:
    """The projected features: a tensor, or (since transformers 5) the pooled part of an output object."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled
