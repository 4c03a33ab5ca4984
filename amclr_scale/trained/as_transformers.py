"""Our model as one of transformers': every pair of towers, with the calls of its dual encoders.

    import amclr_scale.trained.as_transformers
    model = transformers.AutoModel.from_pretrained(FOLDER)
    model.get_image_features(pixel_values), model.get_text_features(input_ids)        (n, D), unit length

transformers' own VisionTextDualEncoder reads a text tower through a pooler that ours do not have (and knows neither
our towers nor torchvision's), so its numbers would differ; this class keeps them. pixel_values are images in [0, 1] or
uint8, which the model normalises itself; texts are ids of the tokenizer in FOLDER/tokenizer.
"""

import json
from pathlib import Path
from typing import Any, cast

import yaml
from torch import Tensor

from amclr_scale.config.load import build
from amclr_scale.data.tokenizers import load_tokenizer
from amclr_scale.disk import save_tensors
from amclr_scale.encoders.build import build_model
from amclr_scale.encoders.libraries.open_clip_towers import architecture_of
from amclr_scale.encoders.libraries.transformers_parts import TOWERS
from amclr_scale.evaluation.models import load_model
from amclr_scale.torchvision_ops import import_torchvision

import_torchvision()  # transformers imports it, and a build that lacks its operators must be mended before
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel  # noqa: E402

TYPE = "amclr_scale_dual_encoder"


class DualEncoderConfig(PretrainedConfig):  # type: ignore[misc]
    """A resolved configuration of ours, what of the tokenizer the towers depend on, architectures of transformers."""

    model_type = TYPE

    def __init__(
        self,
        recipe: dict[str, Any] | None = None,
        vocabulary: dict[str, Any] | None = None,
        text_architecture: dict[str, Any] | None = None,
        image_architecture: dict[str, Any] | None = None,
        **keys: Any,
    ):
        self.recipe, self.vocabulary, self.text_architecture = recipe or {}, vocabulary or {}, text_architecture
        self.image_architecture = image_architecture
        super().__init__(**keys)


class DualEncoderModel(PreTrainedModel):  # type: ignore[misc]
    """The towers, in transformers' clothes."""

    config_class = DualEncoderConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"

    def __init__(self, config: DualEncoderConfig):
        super().__init__(config)
        ours = build(config.recipe, trusted=False)
        data = ours.data
        started = ours.model.model_copy(update={"init": TYPE})  # the weights are yet to come
        self.model = build_model(
            started, **config.vocabulary, context_length=data.context_length, image_size=data.image_size,
            image_mean=data.image_mean, image_std=data.image_std, weights=False,
            text_architecture=config.text_architecture, image_architecture=config.image_architecture,
        )  # fmt: skip
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        """The constructor has done it, but for what no file has: models are built where nothing has memory."""
        mask = getattr(module, "attn_mask", None)
        if isinstance(mask, Tensor) and hasattr(module, "build_causal_mask"):  # open_clip's text towers
            module.attn_mask = module.build_causal_mask().to(mask.device)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> Tensor:
        """(n, 3, H, W) -> (n, D), unit length."""
        return cast(Tensor, self.model(images=(pixel_values,))["image"])

    def get_text_features(self, input_ids: Tensor, **_: Any) -> Tensor:
        """(n, L) -> (n, D), unit length."""
        return cast(Tensor, self.model(texts=(input_ids,))["text"])

    def forward(self, pixel_values: Tensor, input_ids: Tensor, **_: Any) -> dict[str, Tensor]:
        """Both, and their similarities times the learned scale, (images, texts)."""
        out = self.model(images=(pixel_values,), texts=(input_ids,))
        logits = out["logit_scale"] * out["image"] @ out["text"].T
        return {"image_embeds": out["image"], "text_embeds": out["text"], "logits_per_image": logits}


AutoConfig.register(TYPE, DualEncoderConfig, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoderModel, exist_ok=True)


def write(folder: Path) -> None:
    """Add transformers' files to an exported folder."""
    loaded = load_model(str(folder))
    config = build(yaml.safe_load((folder / "config.yaml").read_text("utf-8")), trusted=False)
    words = load_tokenizer(loaded.config.data.tokenizer, config.data.context_length)
    vocabulary = {"vocab_size": words.vocab_size, "pad_id": words.pad_id, "end_id": words.end_id}
    architectures = {f"{side}_architecture": architecture_of(folder / place) for side, place in TOWERS.items()}
    described = DualEncoderConfig(
        config.model_dump(mode="json"), vocabulary, architectures=["DualEncoderModel"], **architectures
    )
    (folder / "config.json").write_text(json.dumps(described.to_dict(), indent=1) + "\n")
    weights = {f"model.{name}": value.clone() for name, value in loaded.model.state_dict().items()}
    save_tensors(weights, folder / "model.safetensors", metadata={"format": "pt"})
