"""Vision models of transformers as image towers: of a whole dual encoder's folder, of one by itself, or of a type."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from amclr_scale.config.schema import ImageTower
from amclr_scale.encoders.libraries.transformers_parts import lacks, pretrained_model, random_model, read_config
from amclr_scale.errors import UserError


class VisionModel(nn.Module):
    """(b, 3, H, W) -> (b, width): what the library calls the pooled output; without one, its first token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        out: Any = self.model(pixel_values=images)
        pooled = getattr(out, "pooler_output", None)
        features: Tensor = out.last_hidden_state[:, 0] if pooled is None else pooled.flatten(1)
        return features


def vision_tower(
    tower: ImageTower, image_size: int, architecture: dict[str, Any] | None = None
) -> tuple[VisionModel, int]:
    """The tower with random weights, and its width.

    Args:
        architecture: the config.json of a vision model, instead of the one that the tower's name says.

    Raises:
        UserError: there is no such model, or it takes more than pixels.
    """
    name = tower.name.partition("/")[2]
    config = read_config(name, "image", architecture)
    sized = isinstance(getattr(config, "image_size", None), int)
    if sized and not tower.pretrained and architecture is None and not Path(name).is_dir():
        config.image_size = image_size
    model = random_model(config, "image")
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise UserError(f"model.image.name: expected a vision model, got {config.model_type} from {tower.name}")
    return VisionModel(model), int(getattr(config, "hidden_size", 0) or 0)


def load_pretrained(module: VisionModel, tower: ImageTower) -> None:
    """Copy a folder's weights into the tower; a pooling layer that the folder has not is left away.

    Raises:
        UserError: the folder has not all of the others.
    """
    name = tower.name.partition("/")[2]
    found, missing = pretrained_model(read_config(name, "image"), name, "image")
    pooler = [each for each in missing if each.startswith("pooler.")]
    if len(pooler) < len(missing):
        raise lacks(name, "image", [each for each in missing if each not in pooler])
    if pooler:
        found.pooler = None
    module.model = found
