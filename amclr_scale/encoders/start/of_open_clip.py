"""Models of open_clip to start from: `ARCHITECTURE:FILE` or a folder as open_clip saves and publishes them.

`ARCHITECTURE/TAG:FILE` says which of the published weights the file is, and so how these want pictures.

FILE may be OpenAI's own, an archive of TorchScript whose activations are QuickGELU. A model whose captions go through a
tokenizer of transformers (its SigLIP) is started from its folder of transformers instead.
"""

import logging
import zipfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.libraries.open_clip_towers import CONFIG, described
from amclr_scale.encoders.start.of_runs import learned
from amclr_scale.encoders.weights import look_into, read_weights
from amclr_scale.errors import UserError, did_you_mean

FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
NAMES = {"visual.": "image_tower.model.", "text.": "text_tower.tokens.model."}
log = logging.getLogger(__name__)


def keys(place: Path) -> dict[str, Any]:
    """What the model settles of a recipe. `place` is a folder, or ARCHITECTURE:FILE."""
    name, file = _place(place)
    tag = _tag(place)
    found = described(name, "model.init")
    model = found["model_cfg"]
    text, size = model["text_cfg"], model["vision_cfg"].get("image_size", 224)
    if text.get("hf_tokenizer_name") or text.get("tokenizer_kwargs"):
        through = text.get("hf_tokenizer_name") or "its own cleaning"
        raise UserError(
            f"model.init: open_clip/{name} reads captions through {through}; expected a model "
            "with CLIP's tokenizer; of others, start from their folder of transformers"
        )
    if not isinstance(size, int):
        raise UserError(f"model.init: expected a model for square pictures, got {size} of open_clip/{name}")
    pictures = _clip() | (found.get("preprocess_cfg") or preprocessing(name, tag))
    taken: dict[str, Any] = {
        "model.embedding_width": model["embed_dim"],
        "model.text.pooling": "model",
        "data.tokenizer": "clip",
        "data.context_length": text.get("context_length", 77),
        "data.image_size": size,
        "data.image_mean": tuple(pictures["mean"]),
        "data.image_std": tuple(pictures["std"]),
        "evaluation.resize": "squash" if pictures.get("resize_mode") == "squash" else "crop",
    }
    for side in ("image", "text"):
        taken |= {f"model.{side}.name": f"open_clip/{name}", f"model.{side}.projection": "none"}
    fixed = bool(text.get("no_causal_mask")) or text.get("pool_type", "argmax") == "last"
    return taken | learned(_numbers(str(place), *_stamp(file))) | {"filled": fixed}


def state(place: Path, model: DualEncoder) -> dict[str, Tensor]:
    """The weights under our model's names, in fp32."""
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    for name, value in _weights(place).items():
        before = next((each for each in NAMES if name.startswith(each)), "")
        found[NAMES.get(before, "") + name.removeprefix(before)] = _fp32(
            value.reshape(1) if name.startswith("logit_") else value
        )
    found |= {name: own[name] for name in own if name not in found and name.startswith(("logit_bias", "normalise."))}
    return found


def _fp32(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def preprocessing(architecture: str, tag: str = "") -> dict[str, Any]:
    """What all known weights of an architecture want of pictures, or those of a tag; {}: open_clip's default, CLIP's.

    Raises:
        UserError: there are no weights of that tag.
    """
    import open_clip

    keys = ("mean", "std", "interpolation", "resize_mode")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag and tag not in tags:
        raise UserError(f"model.init: open_clip knows no weights {tag} of {architecture}{did_you_mean(tag, tags)}")
    known = [open_clip.get_pretrained_cfg(architecture, one) for one in ([tag] if tag else tags)]
    wanted: list[dict[str, Any]] = []
    for one in known:
        asked = {key: one[key] for key in keys if one.get(key) is not None}
        if asked not in wanted:
            wanted.append(asked)
    if len(wanted) <= 1:
        return wanted[0] if wanted else {}
    log.warning(
        "open_clip/%s: its published weights want pictures in %d ways, and a file does not say which: CLIP's is taken; "
        "name a folder with %s, or give --set data.image_mean=[...] and data.image_std=[...]",
        architecture, len(wanted), CONFIG,
    )  # fmt: skip
    return {}


def _clip() -> dict[str, Any]:
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    return {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}


def _place(place: Path) -> tuple[str, Path]:
    """What `described` finds, and the file of weights."""
    folder = place.expanduser()
    if (folder / CONFIG).is_file():
        file = next((folder / name for name in FILES if (folder / name).is_file()), None)
        if file is None:
            raise UserError(f"model.init: {folder} holds neither {' nor '.join(FILES)}")
        return str(folder), file
    name, colon, rest = str(place).partition(":")
    file = Path(rest).expanduser()
    if not colon or not file.is_file():
        raise UserError(
            f"model.init: expected open_clip/ARCHITECTURE:FILE with local weights, or open_clip/FOLDER with {CONFIG}, "
            f"got open_clip/{place}"
        )
    return name.partition("/")[0], file


def _tag(place: Path) -> str:
    """TAG of ARCHITECTURE/TAG:FILE; "": none is said."""
    name, colon, _ = str(place).partition(":")
    return name.partition("/")[2] if colon else ""


def _weights(place: Path, *, mapped: bool = False) -> dict[str, Tensor]:
    """By the names of open_clip's models that have their text tower under `text`.

    Args:
        mapped: leave the tensors on the disk until they are used; of TorchScript they are read all the same.
    """
    from open_clip.model import convert_to_custom_text_state_dict

    name, file = _place(place)
    if _is_script(file):
        if not described(name, "model.init")["model_cfg"].get("quick_gelu"):
            raise UserError(
                f"model.init: {file} is OpenAI's own, whose activations are QuickGELU: expected such as "
                f"open_clip/{name}-quickgelu:{file}, got {name}"
            )
        found = torch.jit.load(str(file), map_location="cpu").state_dict()
        found = {key: value for key, value in found.items() if key.rpartition(".")[2] not in _OF_SCRIPTS}
    else:
        found = read_weights(str(file), "model.init", mapped=mapped)
    plain = {key.removeprefix("module."): value for key, value in found.items()}
    converted: dict[str, Tensor] = convert_to_custom_text_state_dict(plain)
    return converted


def _stamp(file: Path) -> tuple[int, int]:
    """What changes when a file does."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


@cache
def _numbers(place: str, size: int, changed: int) -> dict[str, Tensor]:
    """Scale and bias, looked up once: of .safetensors without reading the rest, of others the rest is left on the disk.

    Args:
        size, changed: of the file, so that another one in its place is looked at again.
    """
    file = _place(Path(place))[1]
    if file.suffix == ".safetensors":
        found = look_into(str(file), "model.init", (*_LEARNED, *(f"module.{one}" for one in _LEARNED)))[1]
    else:
        found = _weights(Path(place), mapped=True)
    plain = {name.removeprefix("module."): value for name, value in found.items()}
    return {name: plain[name].clone() for name in _LEARNED if name in plain}


_LEARNED = ("logit_scale", "logit_bias")
_OF_SCRIPTS = ("input_resolution", "context_length", "vocab_size", "attn_mask")


def _is_script(file: Path) -> bool:
    """Whether a file is an archive of TorchScript."""
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/constants.pkl") for name in archive.namelist())
