"""Models of open_clip: an architecture with a file of weights, or a folder as open_clip saves and publishes them.

A folder says how its model wants pictures, and so does `ARCHITECTURE/TAG:FILE`. A file does not: where all weights
that open_clip knows for an architecture want the same (its SigLIP models: squashed, mean and deviation 0.5), that is
taken, otherwise CLIP's, with a warning.
"""

import json
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from amclr_scale.config.schema import Config
from amclr_scale.data.augmentation.pictures import Picture
from amclr_scale.data.reading import Reading
from amclr_scale.encoders.libraries.open_clip_towers import CONFIG
from amclr_scale.encoders.start.of_open_clip import preprocessing
from amclr_scale.errors import UserError
from amclr_scale.evaluation.foreign.model import CAPTIONS, Foreign, foreign_config, proof_picture, prove
from amclr_scale.torchvision_ops import import_torchvision


def open_open_clip(name: str, rest: str) -> tuple[Foreign, Config, Reading]:
    """`ARCHITECTURE:FILE` or a folder: the model, and how it reads.

    Raises:
        UserError: there is no such architecture or file, the weights are of another one, or a part would have to be
            downloaded.
    """
    try:
        import_torchvision()
        import open_clip
    except ImportError as error:
        raise UserError(f"checkpoint: {name} needs open_clip_torch: pip install open_clip_torch ({error})") from error
    folder = Path(rest).expanduser()
    known, _, file = rest.partition(":")
    architecture, _, tag = known.partition("/")
    try:
        if (folder / CONFIG).is_file():
            text = json.loads((folder / CONFIG).read_text("utf-8"))["model_cfg"].get("text_cfg", {})
            _check_local(name, text)
            inner, *_, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}", weights_only=True)
            tokenizer = _tokenizer(name, text, folder)
        else:
            text = _known(name, architecture, file)
            wanted = {f"image_{key}": value for key, value in preprocessing(architecture, tag).items()}
            inner, *_, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=file, weights_only=True, **wanted
            )
            tokenizer = _tokenizer(name, text, Path(file).parent)
    except UserError:
        raise
    except Exception as error:  # open_clip and torch raise many kinds, of files that are something else
        what = f"weights of {architecture}" if file else "a model of open_clip"
        told = "it holds no tensors alone" if isinstance(error, UnpicklingError) else str(error) or type(error).__name__
        raise UserError(f"checkpoint: {file or folder} does not hold {what}: {told}") from error
    inner.eval()
    mean, std = tuple(inner.visual.preprocess_cfg["mean"]), tuple(inner.visual.preprocess_cfg["std"])
    model = Foreign(inner, inner.encode_image, inner.encode_text, mean, std)
    reading = Reading(tokenizer, _view(preprocess))
    with torch.no_grad():
        want = {
            "image": inner.encode_image(preprocess(proof_picture())[None], normalize=True),
            "text": inner.encode_text(tokenizer(CAPTIONS), normalize=True),
        }
    prove(name, "open_clip", model, reading, want)
    source = "clip" if not text.get("hf_tokenizer_name") else str(folder if folder.is_dir() else Path(file).parent)
    context = tokenizer(CAPTIONS[:1]).shape[1]
    return model, foreign_config(source, context, reading.blank.shape[-1], mean, std), reading


def _known(name: str, architecture: str, file: str) -> dict[str, Any]:
    """The text part of an architecture's configuration."""
    import open_clip

    if architecture not in open_clip.list_models():
        folder = Path(name.partition("/")[2]).expanduser()
        if folder.is_dir():
            raise UserError(
                f"checkpoint: expected {CONFIG} in {folder}, as open_clip publishes its models, got {name}; weights "
                "without it are named open_clip/ARCHITECTURE:FILE"
            )
        raise UserError(f"checkpoint: open_clip has no architecture {architecture}, got {name}")
    if not Path(file).is_file():
        raise UserError(f"checkpoint: expected open_clip/{architecture}:FILE with local weights, got {name}")
    text: dict[str, Any] = (open_clip.get_model_config(architecture) or {}).get("text_cfg", {})
    _check_local(name, text)
    return text


def _check_local(name: str, text: dict[str, Any]) -> None:
    inner = text.get("hf_model_name")
    if inner and not Path(inner).is_dir():
        raise UserError(
            f"checkpoint: {name}: its text model's configuration is {inner}, on a hub; nothing is downloaded, and such "
            f"a model can be named only as a folder whose {CONFIG} has a local folder as hf_model_name"
        )


def _tokenizer(name: str, text: dict[str, Any], folder: Path) -> Callable[[Any], Tensor]:
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    settings, length = dict(text.get("tokenizer_kwargs", {})), text.get("context_length", 77)
    made: Callable[[Any], Tensor]
    if not text.get("hf_tokenizer_name"):
        made = SimpleTokenizer(context_length=length, **settings)
        return made
    inside = folder / "tokenizer" if (folder / "tokenizer").is_dir() else folder
    try:
        made = HFTokenizer(
            str(inside),
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            local_files_only=True,
            **settings,
        )
    except Exception as error:  # transformers raises many kinds
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"checkpoint: {name}: expected its tokenizer ({text['hf_tokenizer_name']} of the hub: tokenizer.json and "
            f"the like) beside the weights in {inside}, got: {first}"
        ) from error
    return made


def _view(preprocess: Any) -> Callable[[Picture], Tensor]:
    """open_clip's own steps but for the last, which normalises; pixels are 8 bits until then."""
    steps = [step for step in preprocess.transforms if type(step).__name__ != "Normalize"]

    def view(picture: Picture) -> Tensor:
        pixels: Any = picture
        for step in steps:
            pixels = step(pixels)
        return pixels.mul(255).round().to(torch.uint8)  # type: ignore[no-any-return]

    return view
