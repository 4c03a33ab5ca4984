"""Our model as one of open_clip's: of its own towers, or a timm image tower beside a BERT-like text tower.

    model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")
    model.encode_image(pixels, normalize=True), model.encode_text(ids, normalize=True)

Of the second kind, both heads must be linear, and open_clip reads the text tower's architecture from the absolute path
of FOLDER/text_tower, so the folder must stay where it was written; texts are ids of the tokenizer in FOLDER/tokenizer.
"""

import json
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from amclr_scale.config.schema import Config
from amclr_scale.disk import save_tensors
from amclr_scale.encoders.dual_encoder import DualEncoder
from amclr_scale.encoders.libraries.open_clip_towers import CONFIG, OpenClipText, OpenClipVision
from amclr_scale.encoders.libraries.transformers_parts import TOWERS
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import load_model

KINDS = ("bert", "roberta", "xlm-roberta", "electra", "camembert")
POOLERS = {"first": "cls_last_hidden_state_pooler", "mean": "mean_pooler"}
NAMES = {
    "image_tower.": "visual.trunk.",
    "image_head.1.": "visual.head.proj.",
    "text_tower.tokens.model.": "text.transformer.",
    "text_head.1.": "text.proj.",
}
OF_OPEN_CLIP = {"image_tower.model.": "visual.", "text_tower.tokens.model.": "text."}
OF_TRAINING = ("drop_path_rate", "patch_drop_rate", "drop_rate", "proj_drop_rate", "attn_drop_rate", "pos_drop_rate")


def write(folder: Path) -> None:
    """Add open_clip's files to an exported folder, and check that open_clip's model takes all the weights.

    Raises:
        UserError: open_clip has no such towers or heads.
    """
    from amclr_scale.torchvision_ops import import_torchvision

    import_torchvision()
    import open_clip

    loaded = load_model(str(folder))
    config, model = loaded.config, cast(DualEncoder, loaded.model)
    if isinstance(model.image_tower, OpenClipVision) and isinstance(model.text_tower.tokens, OpenClipText):
        described, names = _as_it_came(config, model.image_tower, model.text_tower.tokens), OF_OPEN_CLIP
    else:
        described, names = _put_together(folder, config, model), NAMES
    (folder / CONFIG).write_text(json.dumps(described, indent=1) + "\n")
    weights = {"logit_scale": model.logit_scale.detach().reshape(())}
    if "init_logit_bias" in described["model_cfg"]:
        weights["logit_bias"] = model.logit_bias.detach().reshape(())
    for name, value in model.state_dict().items():
        for ours, theirs in names.items():
            if name.startswith(ours):
                weights[theirs + name.removeprefix(ours)] = value.contiguous()
    save_tensors(weights, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    try:
        _compare(
            open_clip.create_model(f"local-dir:{folder}", load_weights=True, weights_only=True).state_dict(), weights
        )
    except (RuntimeError, KeyError) as error:
        raise UserError(f"--to open_clip: open_clip does not take these weights: {error}") from error


def _preprocess(config: Config) -> dict[str, Any]:
    data = config.data
    mode = "squash" if config.evaluation.resize == "squash" else "shortest"
    return {
        "mean": list(data.image_mean), "std": list(data.image_std), "size": data.image_size, "resize_mode": mode,
        "interpolation": "bicubic",
    }  # fmt: skip


def _as_it_came(config: Config, image: OpenClipVision, text: OpenClipText) -> dict[str, Any]:
    """What describes a model that was built of open_clip's own towers; its text tower is called text."""
    of_image, of_text = image.described["model_cfg"], text.described["model_cfg"]
    for side in TOWERS:
        if (head := getattr(config.model, side).projection) != "none":
            raise UserError(
                f"--to open_clip: model.{side}.projection: expected none, as open_clip's towers have no head behind "
                f"their own projection, got {head}"
            )
    quick = [bool(one.get("quick_gelu")) for one in (of_image, of_text)]
    if quick[0] != quick[1]:
        raise UserError(
            f"--to open_clip: model.text.name: expected an architecture with quick_gelu {quick[0]}, as "
            f"{config.model.image.name}, got {config.model.text.name}"
        )
    vision = {**of_image["vision_cfg"], "image_size": config.data.image_size}
    model = {**of_image, "vision_cfg": vision, "text_cfg": of_text["text_cfg"], "custom_text": True}
    if (length := model["text_cfg"].get("context_length", 77)) != config.data.context_length:
        raise UserError(
            f"--to open_clip: data.context_length: expected {length}, as the weights have positions for, got "
            f"{config.data.context_length}"
        )
    return {"model_cfg": model, "preprocess_cfg": _preprocess(config)}


def _put_together(folder: Path, config: Config, model: DualEncoder) -> dict[str, Any]:
    """What describes a timm image tower beside a BERT-like text tower."""
    tower: Any = model.text_tower
    inner: Any = getattr(tower.tokens, "model", None)
    _check(config, inner, str(tower.pooling))
    inner.config.save_pretrained(folder / TOWERS["text"])
    data = config.data
    return {
        "model_cfg": {
            "embed_dim": config.model.embedding_width,
            "vision_cfg": {
                "timm_model_name": config.model.image.name.removeprefix("timm/"),
                "timm_model_pretrained": False,
                "timm_pool": "",
                "timm_proj": "linear",
                "image_size": data.image_size,
            },
            "text_cfg": {
                "hf_model_name": str((folder / TOWERS["text"]).absolute()),
                "hf_tokenizer_name": str((folder / "tokenizer").absolute()),
                "hf_model_pretrained": False,
                "hf_pooler_type": POOLERS[tower.pooling],
                "hf_proj_type": "linear",
                "context_length": data.context_length,
            },
        },
        "preprocess_cfg": _preprocess(config),
    }


def _check(config: Config, inner: Any, pooling: str) -> None:
    image, text = config.model.image, config.model.text
    kind = inner.config.model_type if inner is not None else text.name
    size = _fixed_size(image.name)
    wrong = {
        f"data.image_size: expected {size}, the only size that open_clip builds {image.name} for": size
        not in (None, config.data.image_size),
        "model.image.name: expected timm/NAME": not image.name.startswith("timm/"),
        "model.image.norm: expected another than group": image.norm == "group",
        f"model.image.options: expected {' or '.join(OF_TRAINING)} alone, which matter in training only": bool(
            image.options.keys() - set(OF_TRAINING)
        ),
        f"model.text.name: expected a model of transformers of type {', '.join(KINDS)}": kind not in KINDS,
        "model.text.pooling: expected first or mean": pooling not in POOLERS,
        "model.image.projection, model.text.projection: expected linear": {image.projection, text.projection}
        != {"linear"},
    }
    lines = [words for words, is_wrong in wrong.items() if is_wrong]
    if lines:
        raise UserError("--to open_clip: it has not all parts of this model\n" + "\n".join(lines))


def _fixed_size(name: str) -> int | None:
    """The side in pixels of a timm tower that is made for one size, which open_clip leaves at its default."""
    import timm

    library, _, architecture = name.partition("/")
    known = timm.get_pretrained_cfg(architecture) if library == "timm" and timm.is_model(architecture) else None
    return int(known.input_size[-1]) if known is not None and known.fixed_input_size else None


def _compare(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> None:
    different = [name for name, value in ours.items() if name not in theirs or not theirs[name].equal(value)]
    different += [name for name in theirs if name not in ours and not name.endswith("position_ids")]
    if different:
        raise RuntimeError(f"{len(different)} tensors differ, the first is {different[0]}")
