"""Our model as one of transformers' own dual encoders: CLIP, SigLIP, Chinese-CLIP or VisionTextDualEncoder.

    model = transformers.AutoModel.from_pretrained(FOLDER)             without this package
    model.get_image_features(**image_processor(...)).pooler_output, model.get_text_features(...)   before their norm

Which of them is told by the towers: those of one family make that family's model; other models of transformers, each
pooled as it pools itself, behind linear heads, make a VisionTextDualEncoder. The tokenizer and an image processor lie
beside the weights.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from amclr_scale.config.schema import Config
from amclr_scale.disk import give_usual_mode
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.libraries.transformers_vision import VisionModel
from amclr_scale.encoders.text_towers import PooledTower, TransformersModel
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model
from amclr_scale.torchvision_ops import import_torchvision

OPTION = "--to transformers_dual_encoder"


class Family(NamedTuple):
    """One of the library's dual encoders, by the types of its two models.

    Attributes:
        model: the class is MODELModel, its configuration MODELConfig.
        pooling: of our text tower.
        projection: of both our heads.
        processor: the class of the image processor that squashes a picture; CLIP's cuts out its middle.
    """

    image: str
    text: str
    model: str
    pooling: str
    projection: str
    processor: str


FAMILIES = (
    Family("clip_vision_model", "clip_text_model", "CLIP", "model", "linear", "CLIPImageProcessor"),
    Family("siglip_vision_model", "siglip_text_model", "Siglip", "model", "none", "SiglipImageProcessor"),
    Family(
        "chinese_clip_vision_model", "chinese_clip_text_model", "ChineseCLIP", "first", "linear",
        "ChineseCLIPImageProcessor",
    ),
)  # fmt: skip
ANY = Family("", "", "VisionTextDualEncoder", "model", "linear", "ViTImageProcessor")
NAMES = {
    "image_tower.model.": "vision_model.",
    "text_tower.tokens.model.": "text_model.",
    "image_head.1.": "visual_projection.",
    "text_head.1.": "text_projection.",
}


def write(folder: Path) -> None:
    """Add transformers' files to an exported folder, and check that its model takes all the weights.

    Raises:
        UserError: the towers, heads or tokenizer are not parts of such a model.
    """
    import_torchvision()
    import transformers

    loaded = load_model(str(folder))
    config, model = loaded.config, cast(DualEncoder, loaded.model)
    family = _family(folder, config, model)
    image, text = cast(Any, model.image_tower).model, cast(Any, model.text_tower).tokens.model
    width = config.model.embedding_width
    theirs = getattr(transformers, f"{family.model}Config")
    if family is ANY:
        described = theirs.from_vision_text_configs(image.config, text.config, projection_dim=width)
    else:
        parts = {"vision_config": image.config.to_dict(), "text_config": text.config.to_dict()}
        described = theirs(**parts, **({"projection_dim": width} if family.projection == "linear" else {}))
    made = getattr(transformers, f"{family.model}Model")(described).eval()
    _fill(made, model)
    made.save_pretrained(folder)
    for file in folder.glob("*.safetensors"):
        give_usual_mode(file)
    _image_processor(family, config).save_pretrained(folder)
    words = transformers.AutoTokenizer.from_pretrained(
        str(folder / "tokenizer"), local_files_only=True, trust_remote_code=False
    )
    words.model_max_length = config.data.context_length
    words.save_pretrained(folder)


def _family(folder: Path, config: Config, model: DualEncoder) -> Family:
    """Which dual encoder has these parts."""
    image: Any = model.image_tower
    text: Any = model.text_tower
    of_transformers = {
        "image": isinstance(image, VisionModel),
        "text": isinstance(text, PooledTower) and isinstance(text.tokens, TransformersModel),
    }
    lines = [
        f"model.{side}.name: expected transformers/NAME, got {getattr(config.model, side).name}"
        for side, right in of_transformers.items()
        if not right
    ]
    if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
        lines.append("data.tokenizer: expected a folder of a transformers tokenizer, got one of another library")
    if lines:
        raise UserError(f"{OPTION}: transformers has not all parts of this model\n" + "\n".join(lines))
    types = image.model.config.model_type, text.tokens.model.config.model_type
    family = next((each for each in FAMILIES if (each.image, each.text) == types), ANY)
    if family is ANY and getattr(image.model, "pooler", None) is None:
        lines.append(f"model.image.name: expected a vision model with a pooler of its own, got one of type {types[0]}")
    if text.pooling != family.pooling:
        lines.append(f"model.text.pooling: expected {family.pooling}, got {text.pooling}")
    for side in ("image", "text"):
        if (head := getattr(config.model, side).projection) != family.projection:
            lines.append(f"model.{side}.projection: expected {family.projection}, got {head}")
    if lines:
        raise UserError(f"{OPTION}: {family.model} of transformers has other parts\n" + "\n".join(lines))
    return family


@torch.no_grad()
def _fill(made: Any, model: DualEncoder) -> None:
    """Copy our weights under the library's names: every one of ours, and nothing of theirs is left as it was."""
    own = {name: value for name, value in model.state_dict().items() if name.startswith(tuple(NAMES))}
    left = [n for n in model.state_dict() if n.startswith(("image_", "text_")) and n not in own]
    state: dict[str, Tensor] = {}
    for ours, name in NAMES.items():
        state |= {name + n.removeprefix(ours): value for n, value in own.items() if n.startswith(ours)}
    theirs = made.state_dict()
    state |= {
        n: getattr(model, n).detach().reshape(theirs[n].shape) for n in ("logit_scale", "logit_bias") if n in theirs
    }
    missing, foreign = sorted(theirs.keys() - state.keys()), sorted(state.keys() - theirs.keys())
    shapes = sorted(name for name in state.keys() & theirs.keys() if state[name].shape != theirs[name].shape)
    if left or missing or foreign or shapes:
        some = ", ".join([*left, *missing, *foreign, *shapes][:3])
        raise UserError(f"{OPTION}: {type(made).__name__} does not take these weights: {some}")
    made.load_state_dict(state)


def _image_processor(family: Family, config: Config) -> Any:
    """What makes of a picture the pixels that our image tower is evaluated with."""
    import transformers

    data, side = config.data, config.data.image_size
    square = {"height": side, "width": side}
    if config.evaluation.resize == "squash":
        made = getattr(transformers, family.processor)
        size: dict[str, Any] = {"size": square}
        size |= {} if family.model == "Siglip" else {"do_center_crop": False}
    else:
        made = transformers.CLIPImageProcessor
        size = {"size": {"shortest_edge": side}, "crop_size": square, "do_center_crop": True}
    return made(
        **size, do_resize=True, resample=3, do_rescale=True, rescale_factor=1 / 255, do_normalize=True,
        image_mean=list(data.image_mean), image_std=list(data.image_std),
    )  # fmt: skip
