"""Dual encoders saved by transformers to start from: CLIP, SigLIP, Chinese-CLIP and VisionTextDualEncoder.

Their two models become our towers, each pooled as its library does it, their projections our linear heads; SigLIP has
none, and its captions are always filled up and never masked. Folders of SigLIP 2 with fixed sizes are of type siglip.
"""

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.libraries.transformers_parts import read_folder
from amclr_scale.encoders.start.of_runs import learned
from amclr_scale.errors import UserError, one_of

# How the text model's tokens become one feature, by type.
POOLING = {"clip": "model", "siglip": "model", "chinese_clip": "first", "vision-text-dual-encoder": "model"}
HEADS = {"image_head.1.weight": "visual_projection.weight", "text_head.1.weight": "text_projection.weight"}


def keys(folder: Path) -> dict[str, Any]:
    """What the folder says about the model, and how it reads pictures and captions."""
    config, tokenizer, processor = read_folder(folder, key="model.init", model=False)
    kind = config.model_type
    if kind not in POOLING:
        further = "; it reads patches with a mask: those of fixed size are of type siglip" if kind == "siglip2" else ""
        raise UserError(f"model.init: expected a model of type {one_of(POOLING)}, got {kind} in {folder}{further}")
    text, vision = config.get_text_config(), config.vision_config
    heads = kind != "siglip"
    mean, std = pixel_statistics(processor)
    size, squashed = _square(processor)
    length = min(int(tokenizer.model_max_length), int(getattr(text, "max_position_embeddings", 512)))
    found: dict[str, Any] = {
        "model.embedding_width": config.projection_dim if heads else text.projection_size,
        "data.tokenizer": str(folder),
        "data.context_length": length,
        "data.image_size": getattr(vision, "image_size", None) or size,
        "data.image_mean": mean,
        "data.image_std": std,
        "evaluation.resize": "squash" if squashed else "crop",
        "model.text.pooling": POOLING[kind],
    }
    for side in ("image", "text"):
        found |= {
            f"model.{side}.name": f"transformers/{folder}",
            f"model.{side}.pretrained": True,
            f"model.{side}.projection": "linear" if heads else "none",
        }
    try:
        scale = _learned(folder)
    except UserError:
        raise
    except Exception as error:  # whatever the readers raise about a broken file
        first = str(error).strip().partition("\n")[0]
        raise UserError(
            f"model.init: the weights in {folder} cannot be read: damaged, or pointers of git-lfs? {first}"
        ) from error
    return found | learned(scale) | {"filled": kind == "siglip"}


def state(folder: Path, model: DualEncoder) -> dict[str, Tensor]:
    """The weights under our model's names, in fp32."""
    from transformers import AutoModel

    try:
        inner, report = AutoModel.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
        )
    except Exception as error:  # the library raises many kinds
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"model.init: the weights in {folder} cannot be loaded: {first}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"model.init: {folder} lacks {len(missing)} weights of its model ({', '.join(missing[:3])})")
    theirs, own = inner.state_dict(), model.state_dict()
    places = {"image_tower.model.": "vision_model.", "text_tower.tokens.model.": "text_model."}
    found: dict[str, Tensor] = {}
    for ours, before in places.items():
        found |= {ours + n.removeprefix(before): value for n, value in theirs.items() if n.startswith(before)}
    found |= {ours: theirs[name] for ours, name in HEADS.items() if name in theirs}
    found |= {name: theirs[name].reshape(1) for name in ("logit_scale", "logit_bias") if name in theirs}
    found |= {name: own[name] for name in own if name not in found and name.startswith(("logit_bias", "normalise."))}
    return found


def pixel_statistics(processor: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] that do what an image processor does: factor, offset, normalise."""
    factor = processor.rescale_factor if processor.do_rescale else 1.0
    offset = 1.0 if processor.do_rescale and getattr(processor, "rescale_offset", False) else 0.0
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    whole = 255.0 * factor
    return tuple((m + offset) / whole for m in mean), tuple(s / whole for s in std)


def _square(processor: Any) -> tuple[int | None, bool]:
    """The side of the pictures that a processor makes, and whether it gives up their proportions."""
    size, crop = processor.size or {}, getattr(processor, "crop_size", None) or {}
    cropped = bool(getattr(processor, "do_center_crop", False) and crop)
    side = crop.get("height") if cropped else size.get("height", size.get("shortest_edge"))
    return side, not cropped and "height" in size


def _learned(folder: Path) -> dict[str, Tensor]:
    """Scale and bias, without reading the rest."""
    wanted = ("logit_scale", "logit_bias")
    files = sorted(folder.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    if not files:
        return {name: value for name, value in _pickled(folder).items() if name in wanted}
    from safetensors import safe_open

    for file in files:
        with safe_open(str(file), "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in wanted if name in tensors.keys()}  # noqa: SIM118
    return found


def _pickled(folder: Path) -> dict[str, Tensor]:
    """The tensors of pytorch_model.bin, or of the parts that its index lists, left on the disk until they are used."""
    index = folder / "pytorch_model.bin.index.json"
    parts = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values())) if index.is_file() else []
    found: dict[str, Tensor] = {}
    for name in parts or ["pytorch_model.bin"]:
        if not (folder / name).is_file():
            raise UserError(f"model.init: {folder} holds no weights (*.safetensors or pytorch_model.bin)")
        loaded = torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
        found |= cast(dict[str, Tensor], loaded)
    return found
