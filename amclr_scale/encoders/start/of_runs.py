"""A run or an export of ours to start another run from."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from amclr_scale.config.load import load
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.libraries.open_clip_towers import kept_name
from amclr_scale.encoders.libraries.transformers_parts import TOWERS
from amclr_scale.encoders.weights import OF_OBJECTIVES, look_into, read_weights
from amclr_scale.errors import UserError

_TOWER = ("name", "projection", "pretrained")
_IMAGE = ("width", "depth", "norm", "options")
_TEXT = ("width", "layers", "heads", "pooling")
_DATA = ("context_length", "image_size", "image_mean", "image_std")


def _places(path: Path) -> tuple[Path, Path]:
    """The folder, and the file of weights in it."""
    return (path, path / "weights.safetensors") if path.is_dir() else (path.parent, path)


def keys(path: Path) -> dict[str, Any]:
    """What the run's recipe says about the model, and how it reads pictures and captions."""
    folder, file = _places(path)
    for needed in (file, folder / "config.yaml"):
        if not needed.is_file():
            raise UserError(
                f"model.init: expected a run that has come to its end, or an export, got {path}: {needed} does not "
                "exist; of a run that is under way: amclr-scale export RUN --out FOLDER"
            )
    config = load(folder / "config.yaml", trusted=False)
    model, data = config.model, config.data
    found: dict[str, Any] = {"model.embedding_width": model.embedding_width}
    found |= {f"model.image.{name}": getattr(model.image, name) for name in (*_TOWER, *_IMAGE)}
    found |= {f"model.text.{name}": getattr(model.text, name) for name in (*_TOWER, *_TEXT)}
    found |= {f"data.{name}": getattr(data, name) for name in _DATA}
    for side, place in TOWERS.items():
        if (folder / place).is_dir():
            found[f"model.{side}.name"] = kept_name(getattr(model, side).name, folder / place)
    own = folder / "tokenizer"
    found["data.tokenizer"] = str(own) if own.is_dir() else data.tokenizer
    found["evaluation.resize"] = config.evaluation.resize
    names, scale = look_into(str(file), "model.init", ("logit_scale", "logit_bias"))
    statistics = any(n.startswith("image_tower.") and n.endswith(".running_mean") for n in names)
    if statistics and found["model.image.norm"] == "default":
        found["model.image.norm"] = "frozen"  # as BatchNorm was in a tower that was frozen, which needs no choice
    return found | learned(scale)


def learned(weights: dict[str, Tensor]) -> dict[str, float]:
    """The keys of the recipe that a model's scale and bias stand for, of those that are there."""
    scale, bias = weights.get("logit_scale"), weights.get("logit_bias")
    found = {} if scale is None else {"model.temperature": math.exp(-scale.item())}
    return found if bias is None else found | {"model.logit_bias": bias.item()}


def state(path: Path, model: DualEncoder) -> dict[str, Tensor]:
    """The weights under the model's own names, without an objective's own parts and heads of inner layers."""
    found = read_weights(str(_places(path)[1]), "model.init")
    return {name: value for name, value in found.items() if not name.startswith((*OF_OBJECTIVES, "taps."))}
