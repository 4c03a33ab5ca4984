"""Models to evaluate, from local files: our runs, open_clip's architectures, folders of transformers.

    FOLDER or FOLDER/weights.safetensors      a run of ours, with its config.yaml beside the weights
    open_clip/ARCHITECTURE:FILE               a checkpoint for one of open_clip's architectures
    transformers/FOLDER                       a CLIP-like model saved by transformers, with its tokenizer

All are called alike: `model(images=(uint8,), texts=(ids,)) -> {"image": (b, D), "text": (b, D)}`, unit length, and
normalise pixels themselves. Nothing is ever downloaded.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.config.load import load
from amclr_scale.config.schema import Config, Data
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.dual_encoder import Normalise
from amclr_scale.encoders.weights import OF_OBJECTIVES, load_weights
from amclr_scale.errors import UserError
from amclr_scale.precision import DTYPES
from amclr_scale.torchvision_ops import import_torchvision

TEXT_TOWER = "text_tower"  # in the folder of a run or an export: the architecture of a text tower of transformers


@dataclass(frozen=True)
class Loaded:
    """A model, and how it wants its images and captions."""

    name: str
    model: nn.Module
    config: Config  # of a run of ours all of it; of others the section `data` only says something
    folder: Path | None  # the run's
    step: str = ""  # the checkpoint's name, of a model that is one
    state: Path | None = None  # the file of the objective's per-sample state, where there is one


class Foreign(nn.Module):
    """A model of another library, called like ours."""

    def __init__(
        self,
        inner: nn.Module,
        encode_image: Callable[[Tensor], Tensor],
        encode_text: Callable[[Tensor], Tensor],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ):
        super().__init__()
        self.inner, self.normalise = inner, Normalise(mean, std)
        self.encode_image, self.encode_text = encode_image, encode_text

    def forward(
        self, images: tuple[Tensor, ...] = (), texts: tuple[Tensor, ...] = (), *, features: bool = False
    ) -> dict[str, Any]:
        if features:
            raise UserError("evaluation.probes.features: expected embedding, the only features known of this model")
        first = next(self.inner.parameters())
        out: dict[str, Any] = {}
        if images:
            out["image"] = _unit(self.encode_image(self.normalise(images[0].to(first.device), first.dtype)))
        if texts:
            out["text"] = _unit(self.encode_text(texts[0].to(first.device)))
        return out


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def load_model(name: str) -> Loaded:
    """A model by one of the names above, in evaluation mode, on the CPU.

    Raises:
        UserError: there is no such thing here, or its parts do not fit together.
    """
    library, _, rest = name.partition("/")
    if library == "open_clip" and rest:
        found = _open_clip(name, *_pair(rest))
    elif library == "transformers" and rest and not Path(name).exists():
        found = _transformers(name, Path(rest).expanduser())
    else:
        found = _ours(name)
    found.model.eval()
    return found


def _ours(name: str) -> Loaded:
    path = Path(name).expanduser()
    folder, weights = (path, path / "weights.safetensors") if path.is_dir() else (path.parent, path)
    missing = [file for file in (weights, folder / "config.yaml") if not file.is_file()]
    if missing:
        raise UserError(
            f"checkpoint: expected a run folder with config.yaml and weights.safetensors, open_clip/ARCHITECTURE:FILE "
            f"or transformers/FOLDER, got {name}: {missing[0]} does not exist"
        )
    config = _with_own_files(load(folder / "config.yaml", trusted=False), folder)
    data = config.data
    tokenizer = load_tokenizer(data.tokenizer, data.context_length)
    tokenizer.check_saved(Path(data.tokenizer))
    model = build_model(
        config.model,
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        end_id=tokenizer.end_id,
        context_length=data.context_length,
        image_size=data.image_size,
        image_mean=data.image_mean,
        image_std=data.image_std,
        weights=False,  # the run's file has them all, whatever it began from
    )
    load_weights(model, str(weights), key="checkpoint", prefix="", extra=OF_OBJECTIVES)
    return Loaded(folder.name, model, config, folder, state=folder / "objective.safetensors")


def _with_own_files(config: Config, folder: Path) -> Config:
    """Runs and exported folders have their tokenizer in them, and the architecture of a text tower of transformers."""
    changes: dict[str, Any] = {}
    if (folder / "tokenizer").is_dir():
        changes["data"] = config.data.model_copy(update={"tokenizer": str(folder / "tokenizer")})
    if (folder / TEXT_TOWER).is_dir():
        text = config.model.text.model_copy(update={"name": f"transformers/{folder / TEXT_TOWER}"})
        changes["model"] = config.model.model_copy(update={"text": text})
    return config.model_copy(update=changes)


def compute_in(loaded: Loaded, precision: str) -> str:
    """Have a model compute as it was trained ("run"), or in fp32, bf16 or fp16; returns which of the three.

    As under DeepSpeed, parameters change and buffers do not. Models of others were trained nobody knows how: fp32.
    """
    chosen = loaded.config.execution.precision if precision == "run" else precision
    for parameter in loaded.model.parameters():
        parameter.data = parameter.data.to(DTYPES[chosen])
    return chosen


def use_statistics(loaded: Loaded, data: Data) -> None:
    """Have the model normalise images by another mean and standard deviation than it was trained with."""
    if (data.image_mean, data.image_std) != (loaded.config.data.image_mean, loaded.config.data.image_std):
        loaded.model.normalise = Normalise(data.image_mean, data.image_std)


def _pair(rest: str) -> tuple[str, str]:
    architecture, _, file = rest.partition(":")
    return architecture, file


def _open_clip(name: str, architecture: str, file: str) -> Loaded:
    try:
        import_torchvision()
        import open_clip
    except ImportError as error:
        raise UserError(f"checkpoint: {name} needs open_clip_torch: pip install open_clip_torch ({error})") from error
    if architecture not in open_clip.list_models():
        raise UserError(f"checkpoint: open_clip has no architecture {architecture}, got {name}")
    if not Path(file).is_file():
        raise UserError(f"checkpoint: expected open_clip/{architecture}:FILE with local weights, got {name}")
    if (open_clip.get_model_config(architecture) or {}).get("text_cfg", {}).get("hf_tokenizer_name"):
        raise UserError(f"checkpoint: {architecture} needs a tokenizer from a hub; only open_clip's own is known here")
    try:
        inner = open_clip.create_model(architecture, pretrained=file)
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:
        raise UserError(f"checkpoint: {file} does not hold weights of {architecture}: {error}") from error
    visual = inner.visual
    size = visual.image_size[0] if isinstance(visual.image_size, tuple) else visual.image_size
    model = Foreign(inner, inner.encode_image, inner.encode_text, tuple(visual.image_mean), tuple(visual.image_std))
    return Loaded(
        name, model, _config("clip", int(inner.context_length), int(size), visual.image_mean, visual.image_std), None
    )


def _transformers(name: str, folder: Path) -> Loaded:
    for file in ("config.json", "preprocessor_config.json"):
        if not (folder / file).is_file():
            raise UserError(f"checkpoint: expected a folder saved by transformers, got {name}: it has no {file}")
    try:
        import_torchvision()
        from transformers import AutoModel
    except ImportError as error:
        raise UserError(f"checkpoint: {name} needs transformers: pip install transformers ({error})") from error
    try:
        inner = AutoModel.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"checkpoint: {name} cannot be loaded: {error}") from error
    if not hasattr(inner, "get_image_features") or not hasattr(inner, "get_text_features"):
        raise UserError(f"checkpoint: expected a dual encoder such as CLIP, got {type(inner).__name__} in {name}")
    seen = json.loads((folder / "preprocessor_config.json").read_text("utf-8"))
    size = seen.get("crop_size") or seen["size"]
    side = int(size if isinstance(size, int) else size.get("height") or size["shortest_edge"])
    mean, std = tuple(seen["image_mean"]), tuple(seen["image_std"])
    text = inner.config.get_text_config()
    words = load_tokenizer(str(folder), int(text.max_position_embeddings))
    ends_with_pad = words.pad_id == words.end_id  # as OpenAI's CLIP: the first of them is the caption's end

    def encode_text(ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        last = ((ids != words.pad_id) * places).amax(1, keepdim=True)
        mask = (places <= last + ends_with_pad).long()
        return _tensor(inner.get_text_features(input_ids=ids, attention_mask=mask))

    def encode_image(pixels: Tensor) -> Tensor:
        return _tensor(inner.get_image_features(pixel_values=pixels))

    config = _config(str(folder), int(text.max_position_embeddings), side, mean, std)
    return Loaded(name, Foreign(inner, encode_image, encode_text, mean, std), config, None)


def _tensor(output: Any) -> Tensor:
    """The projected features: a tensor, or (since transformers 5) the pooled part of an output object."""
    pooled: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return pooled


def _config(tokenizer: str, context_length: int, image_size: int, mean: Any, std: Any) -> Config:
    data = {
        "tokenizer": tokenizer,
        "context_length": context_length,
        "image_size": image_size,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return Config.model_validate({"data": data, "train": {"epochs": 1}})
