"""Models of transformers as parts of ours: their configuration, from a type or a local folder, and their weights.

The hub is never asked: a name that is neither a known type nor a folder is an error at once.
"""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from amclr_scale.encoders.libraries.open_clip_towers import save_described
from amclr_scale.encoders.resting import inner_of
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.torchvision_ops import import_torchvision

Side = Literal["image", "text"]
# In the folder of a run or an export: the architecture of a tower of transformers or open_clip.
TOWERS: dict[Side, str] = {"image": "image_tower", "text": "text_tower"}


def read_folder(folder: Path, *, key: str, model: bool) -> tuple[Any, Any, Any]:
    """Configuration or model, tokenizer and image processor of a folder that transformers has saved.

    Args:
        key: what the folder was given as, for messages.
        model: with its weights.

    Raises:
        UserError: transformers is missing, or one of the three.
    """
    try:
        import_torchvision()
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
    except ImportError as error:
        raise UserError(f"{key}: {folder} needs transformers: pip install transformers ({error})") from error
    found: list[Any] = []
    for maker, what in (
        (AutoModel, "a model") if model else (AutoConfig, "a config.json"),
        (AutoTokenizer, "a tokenizer"),
        (AutoImageProcessor, "an image processor (preprocessor_config.json or processor_config.json)"),
    ):
        try:
            found.append(maker.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False))
        except Exception as error:  # the library raises many kinds
            first = str(error).strip().partition("\n")[0]
            raise UserError(f"{key}: {folder}: expected {what} saved by transformers, got: {first}") from error
    return found[0], found[1], found[2]


def read_config(name: str, side: Side, architecture: dict[str, Any] | None = None) -> Any:
    """The configuration of the model for one side, of a folder or a type.

    Args:
        name: behind transformers/.
        architecture: the config.json of such a model, instead of the one that its name says.

    Raises:
        UserError: there is no such folder or type, or it has no model for this side.
    """
    key = f"model.{side}.name"
    try:
        import_torchvision()
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise UserError(f"{key}: transformers/{name} needs transformers: pip install transformers ({error})") from error
    if architecture is not None:
        return _side_of(CONFIG_MAPPING[architecture["model_type"]].from_dict(architecture), side)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{key}: the folder {name} has no config.json; expected one saved by transformers")
        try:
            found = AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().partition("\n")[0]
            raise UserError(
                f"{key}: {name}/config.json is none that transformers reads without code of the folder's "
                f"own, which is never run: {first}"
            ) from error
        return _side_of(found, side)
    types = list(CONFIG_MAPPING.keys())
    if name not in types:
        raise UserError(
            f"{key}: expected a local folder or a type of transformers, got {name}, which is neither"
            f"{did_you_mean(name, types, 3)}. Nothing is downloaded: fetch a model of "
            f"the hub beforehand (hf download {name} --local-dir FOLDER) and name it transformers/FOLDER"
        )
    return _side_of(AutoConfig.for_model(name), side)


def _side_of(config: Any, side: Side) -> Any:
    """The part of a dual encoder's configuration; of one tower its own."""
    return config.get_text_config() if side == "text" else getattr(config, "vision_config", config)


def random_model(config: Any, side: Side) -> Any:
    """The model of a configuration, with random weights in fp32.

    Raises:
        UserError: the library has none.
    """
    from transformers import AutoModel

    try:
        return AutoModel.from_config(config, trust_remote_code=False, dtype=torch.float32)
    except ValueError as error:
        made = _class_of(config)
        if made is None:
            raise UserError(
                f"model.{side}.name: transformers has no {side} model of type {config.model_type}"
            ) from error
        return made(config)


def _class_of(config: Any) -> Any:
    """The text model of a dual encoder that AutoModel does not know by itself: SiglipTextConfig -> SiglipTextModel."""
    import transformers

    return getattr(transformers, f"{type(config).__name__.removesuffix('Config')}Model", None)


def pretrained_model(config: Any, name: str, side: Side) -> tuple[Any, list[str]]:
    """The model with the weights of a folder, in fp32, and the names of its tensors that the folder lacks.

    Raises:
        UserError: there is no such folder, or its weights are not this model's.
    """
    from transformers import AutoModel, PreTrainedModel

    if not Path(name).is_dir():
        raise UserError(f"model.{side}.pretrained: expected a local folder in model.{side}.name, got the type {name}")
    known = type(config) in AutoModel._model_mapping
    maker: type[PreTrainedModel] = AutoModel if known else _class_of(config)
    try:
        model, report = maker.from_pretrained(
            name, config=config, local_files_only=True, output_loading_info=True, trust_remote_code=False,
            dtype=torch.float32,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"model.{side}.name: the weights in {name} cannot be loaded: {error}") from error
    return model, sorted(report["missing_keys"])


def lacks(name: str, side: Side, missing: list[str]) -> UserError:
    """What to say of weights that are not there."""
    return UserError(
        f"model.{side}.name: {name} lacks {len(missing)} weights of its {side} model ({', '.join(missing[:3])})"
    )


def save_architectures(model: nn.Module, folder: Path) -> None:
    """Write what describes each tower of transformers or open_clip into a folder of its own; of others nothing."""
    for side, place in TOWERS.items():
        tower: Any = inner_of(getattr(model, f"{side}_tower"))
        inner: Any = getattr(getattr(tower, "tokens", tower), "model", None)
        if hasattr(inner, "config") and hasattr(inner.config, "save_pretrained"):
            inner.config.save_pretrained(folder / place)
        save_described(getattr(tower, "tokens", tower), folder / place)
