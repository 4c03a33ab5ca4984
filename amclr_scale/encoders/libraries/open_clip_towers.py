"""Towers of open_clip, projections included: by the name of an architecture, or of a folder as open_clip saves models.

Ilharco et al., "OpenCLIP", 2021, doi:10.5281/zenodo.5143773.
"""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amclr_scale.config.schema import ImageTower
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.torchvision_ops import import_torchvision

CONFIG = "open_clip_config.json"


class OpenClipVision(nn.Module):
    """(b, 3, H, W) -> (b, D)."""

    def __init__(self, model: nn.Module, described: dict[str, Any]):
        super().__init__()
        self.model, self.described = model, described

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.model(images)
        return features


class OpenClipText(nn.Module):
    """Token ids (b, L) -> (b, D), padding as open_clip's own tokenizers leave it.

    Attributes:
        pools: it does, by itself.
        filled: ids come with all their padding.
    """

    pools = filled = True

    def __init__(self, model: nn.Module, described: dict[str, Any]):
        super().__init__()
        self.model, self.described = model, described

    def forward(self, ids: Tensor, visible: Tensor, with_tokens: bool = False) -> Any:
        if with_tokens:
            raise UserError(
                "model.text.name: the objective reads text_tokens, and a text tower of open_clip gives captions alone; "
                "expected such as transformers/clip"
            )
        return self.model(ids)


def described(name: str, key: str) -> dict[str, Any]:
    """What a folder or an architecture's entry says: model_cfg, and preprocess_cfg where a folder has it.

    Args:
        name: behind open_clip/.
        key: to name in errors.

    Raises:
        UserError: there is no such architecture, or it has parts that this toolkit does not build.
    """
    try:
        import_torchvision()
        import open_clip
    except ImportError as error:
        raise UserError(
            f"{key}: open_clip/{name} needs open_clip_torch: pip install open_clip_torch ({error})"
        ) from error
    file = Path(name).expanduser() / CONFIG
    if file.is_file():
        found = _read(file, key)
    else:
        known = open_clip.list_models()
        if name not in known:
            raise UserError(
                f"{key}: expected an architecture of open_clip or a folder with {CONFIG}, got {name}"
                f"{did_you_mean(name, known, 3)}"
            )
        found = {"model_cfg": open_clip.get_model_config(name)}
    model = found["model_cfg"]
    text = model.get("text_cfg", {})
    if "multimodal_cfg" in model or text.get("embed_cls") or text.get("hf_model_name"):
        what = "a text model of transformers" if text.get("hf_model_name") else "CoCa's parts"
        raise UserError(f"{key}: open_clip/{name} has {what}; expected a CLIP with open_clip's own text tower")
    return found


def _read(file: Path, key: str) -> dict[str, Any]:
    """A folder's description, with the three parts that every model has."""
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
        lacks = {"embed_dim", "vision_cfg", "text_cfg"} - found["model_cfg"].keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{key}: {file} is no description of a model of open_clip: {error!r:.100}") from error
    if lacks:
        raise UserError(f"{key}: {file} is no description of a model of open_clip: it lacks {', '.join(sorted(lacks))}")
    return found


def vision_tower(
    tower: ImageTower, image_size: int, architecture: dict[str, Any] | None = None
) -> tuple[OpenClipVision, int]:
    """The image tower with random weights, for pictures of this size, and its width, which is the embedding's.

    Args:
        architecture: what `described` gives, instead of that of the tower's name.
    """
    from open_clip.model import _build_vision_tower

    whole = architecture or described(tower.name.partition("/")[2], "model.image.name")
    model = whole["model_cfg"]
    vision = {**model["vision_cfg"], "image_size": image_size, "output_tokens": False}
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    made = _build_vision_tower(model["embed_dim"], vision, model.get("quick_gelu", False))
    return OpenClipVision(made, whole), int(model["embed_dim"])


def text_tower(
    name: str, vocab_size: int, context_length: int, architecture: dict[str, Any] | None = None
) -> tuple[OpenClipText, int]:
    """The text tower with random weights, and its width, which is the embedding's.

    Args:
        name: behind open_clip/.
        vocab_size, context_length: of what it is to read.

    Raises:
        UserError: it has fewer words or positions.
    """
    from open_clip.model import CLIPTextCfg, _build_text_tower

    whole = architecture or described(name, "model.text.name")
    model = whole["model_cfg"]
    text = CLIPTextCfg(**{**model["text_cfg"], "output_tokens": False})
    if vocab_size > text.vocab_size:
        raise UserError(f"data.tokenizer: its {vocab_size} words do not fit the {text.vocab_size} of open_clip/{name}")
    if context_length > text.context_length:
        raise UserError(
            f"data.context_length: expected at most {text.context_length} for open_clip/{name}, got {context_length}"
        )
    made = _build_text_tower(model["embed_dim"], text, model.get("quick_gelu", False))
    return OpenClipText(made, whole), int(model["embed_dim"])


def save_described(tower: nn.Module, folder: Path) -> None:
    """Write the description of a tower of open_clip into a folder; of other towers nothing."""
    if isinstance(tower, OpenClipVision | OpenClipText):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG).write_text(json.dumps(tower.described, indent=1) + "\n")


def architecture_of(folder: Path) -> dict[str, Any] | None:
    """What a run or an export keeps of a tower in this folder, of transformers or of open_clip; None: nothing."""
    for name in ("config.json", CONFIG):
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
            return found
    return None


def kept_name(name: str, folder: Path) -> str:
    """A tower's name where its description is kept in a folder."""
    return f"{name.partition('/')[0]}/{folder}"
