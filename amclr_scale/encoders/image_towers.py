"""Image towers by name: our small ResNet, torchvision's and timm's models without their classifier, transformers'.

A tower of one's own is a module (b, 3, H, W) -> (b, width) and an entry in IMAGE_TOWERS, as in
tests/commands/additions/tower.py.
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from amclr_scale.config.schema import ImageTower
from amclr_scale.encoders.kinds import kind_of
from amclr_scale.encoders.libraries import open_clip_towers
from amclr_scale.encoders.libraries.transformers_vision import VisionModel, load_pretrained, vision_tower
from amclr_scale.encoders.norms import NOTES, convert_batch_norm, has_batch_norm
from amclr_scale.encoders.patch_grid import PatchGrid
from amclr_scale.encoders.small_resnet import SmallResNet
from amclr_scale.encoders.tokens import Place, TokenSearch
from amclr_scale.encoders.trial import UntriedError, trial
from amclr_scale.encoders.weights import load_weights
from amclr_scale.errors import UserError, did_you_mean
from amclr_scale.torchvision_ops import import_torchvision

Build = Callable[[ImageTower, int], tuple[nn.Module, int]]
Found = tuple[int, tuple[str, ...], Place]  # the width, what to tell the user, and where there are tokens
CLASSIFIERS = ("fc", "heads", "classifier", "head")  # torchvision's names for what follows the features


class SizeError(UserError):
    """A tower that is not made for images of this size."""

    def __init__(self, name: str, size: int, why: Exception):
        super().__init__(f"data.image_size: {name} cannot be built for {size} pixels: {_words(why)}")


def _words(error: Exception) -> str:
    """What an error says, in a line; what it is, where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def build_image_tower(
    tower: ImageTower,
    image_size: int,
    *,
    weights: bool = True,
    architecture: dict[str, Any] | None = None,
    started: bool = False,
) -> tuple[nn.Module, int, tuple[str, ...], Place]:
    """(b, 3, H, W) -> (b, width): the tower, its width, what to tell the user about it, and where its tokens are.

    One forward without memory finds that out, and whether the tower takes images of this size.

    Args:
        architecture: of a model of transformers or open_clip, instead of the one that its name says.
        started: whether its weights come from elsewhere, later.

    Raises:
        UserError: an unknown name, a size or weights that do not fit, or a BatchNorm tower without a choice of `norm`.
    """
    build = kind_of(tower.name, IMAGE_TOWERS, "model.image.name")
    if architecture is not None:
        build = partial(DESCRIBED[tower.name.partition("/")[0]], architecture=architecture)
    try:
        module, width = build(tower, image_size)
    except SizeError as error:
        raise UserError(f"{error}{_sizes_near(tower, image_size)}") from error
    width, notes, place = _tried(build, module, width, tower, image_size)
    if tower.pretrained and not isinstance(module, VisionModel):
        raise UserError(f"model.image.pretrained: expected transformers/FOLDER in model.image.name, got {tower.name}")
    if tower.pretrained and weights:
        load_pretrained(cast(VisionModel, module), tower)
    if tower.weights is not None and weights:
        load_weights(module, tower.weights, key="model.image.weights", prefix="image_tower.")
    note = None if _holds_still(tower) else NOTES.get(tower.norm)
    return (
        _normalised(module, tower, has_weights=started or tower.pretrained or tower.weights is not None),
        width,
        (*notes, *([note] if note else ())),
        place,
    )


def _holds_still(tower: ImageTower) -> bool:
    """Whether all of its BatchNorm stays in evaluation mode."""
    return tower.frozen and not tower.unfrozen_blocks


def _tried(build: Build, module: nn.Module, width: int, tower: ImageTower, size: int) -> Found:
    """What `_try` finds, once in a process for each section and size where these settle it.

    Plans and searches build the same tower over and over, and a trial takes longer than the tower.
    """
    key = (build, tower.model_dump_json(), size, any(p.is_meta for p in module.parameters()))
    if key not in _TRIED:
        try:
            found = _try(module, tower, size)
        except UntriedError:  # it has no memory here, and looks at numbers
            return width, (), Place(tower.name)
        if build not in _SETTLED:
            return found
        _TRIED[key] = found
    return _TRIED[key]


def _try(module: nn.Module, tower: ImageTower, size: int) -> Found:
    """The width of the features, how many pixels a grid of patches cuts off, and where there are tokens.

    Raises:
        UserError: the tower does not take images of this size, or gives something else than features.
        UntriedError: it has no memory here, and looks at numbers.
    """
    grid, search = PatchGrid(module, size), TokenSearch(module, 2)
    try:
        out = trial(module, torch.zeros(2, 3, size, size))
    except UntriedError:
        raise
    except Exception as error:  # whatever a tower raises about images that it cannot take
        raise UserError(
            f"data.image_size: {tower.name} does not take images of {size} pixels ({_words(error)})"
            f"{_sizes_near(tower, size)}"
        ) from error
    finally:
        grid.close()
        search.close()
    if not isinstance(out, Tensor) or out.dim() != 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"model.image.name: expected one vector per image, (2, width) for two, got {got} from {tower.name}"
        )
    unseen, width = grid.unseen(), int(out.shape[1])
    notes = (f"data.image_size: {tower.name} never sees {unseen}",) if unseen else ()
    if isinstance(module, open_clip_towers.OpenClipVision):
        return width, notes, Place(tower.name)  # its projection is of the pooled features, not of tokens
    return width, notes, search.place(tower.name, width)


def _sizes_near(tower: ImageTower, size: int) -> str:
    """Sizes that it takes, in words: the next ones below and above among multiples of common patches."""
    near: dict[bool, int] = {}
    candidates = {max(1, size // m + step) * m for m in (14, 16, 28, 32, 64) for step in (0, 1)} | {224, 256}
    for one in sorted(candidates - {size}, key=lambda other: abs(other - size)):
        if (one > size) not in near and _takes(tower, one):
            near[one > size] = one
    return f"; it takes {' and '.join(str(near[key]) for key in sorted(near))}" if near else ""


def _takes(tower: ImageTower, size: int) -> bool:
    with torch.device("meta"):
        try:
            module, _ = kind_of(tower.name, IMAGE_TOWERS, "model.image.name")(tower, size)
            trial(module, torch.zeros(2, 3, size, size))
        except Exception:  # whatever it raises: it is one size among others
            return False
    return True


def _small_resnet(tower: ImageTower, image_size: int) -> tuple[nn.Module, int]:
    if tower.depth not in (10, 18):
        raise UserError(f"model.image.depth: expected 10 or 18, got {tower.depth}")
    batch_norm = tower.norm not in ("default", "group")
    module = SmallResNet(tower.width, tower.depth, image_size, batch_norm=batch_norm)
    return module, module.width


def _normalised(module: nn.Module, tower: ImageTower, *, has_weights: bool) -> nn.Module:
    if not has_batch_norm(module):
        if tower.norm in ("default", "group"):
            return module
        raise UserError(
            f"model.image.norm: {tower.name} has no BatchNorm to change; expected default, got {tower.norm}"
        )
    if tower.norm == "default" and _holds_still(tower):
        return convert_batch_norm(module, "frozen", pretrained=has_weights)
    if tower.norm == "default":
        raise UserError(
            f"model.image.norm: {tower.name} uses BatchNorm, whose results depend on who is in the batch. Expected a "
            "choice: group (per sample, does not depend on ranks or micro-batch), sync (over all ranks, not under the "
            "gradient cache), frozen (the statistics of model.image.weights) or batch (each rank's micro-batch alone)"
        )
    return convert_batch_norm(module, tower.norm, pretrained=has_weights)


def _torchvision(tower: ImageTower, image_size: int) -> tuple[nn.Module, int]:
    name = tower.name.partition("/")[2]
    try:
        import_torchvision()
        from torchvision import models
    except ImportError as error:
        raise UserError(
            f"model.image.name: torchvision/{name} needs torchvision: pip install torchvision ({error})"
        ) from error
    known = models.list_models(module=models)
    if name not in known:
        raise UserError(f"model.image.name: torchvision has no model {name}{did_you_mean(name, known, 3)}")
    fixed = {"image_size": image_size} if name.startswith("vit_") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # two old models announce other initial weights, unasked
        try:
            module: nn.Module = models.get_model(name, weights=None, **fixed)
        except (ValueError, RuntimeError, AssertionError) as error:
            raise SizeError(f"torchvision/{name}", image_size, error) from error
    if name in ("inception_v3", "googlenet"):
        raise UserError(
            f"model.image.name: torchvision/{name} has several outputs in training; choose another, such as resnet50"
        )
    return module, _drop_classifier(module)


def _drop_classifier(module: nn.Module) -> int:
    """Replace the last linear layer by nothing; returns the width of what it got."""
    for attribute in CLASSIFIERS:
        head = getattr(module, attribute, None)
        if isinstance(head, nn.Linear):
            setattr(module, attribute, nn.Identity())
            return head.in_features
        if isinstance(head, nn.Sequential) and isinstance(head[-1], nn.Linear):
            last = head[-1]
            head[-1] = nn.Identity()
            return last.in_features
    raise UserError(
        f"model.image.name: {type(module).__name__} of torchvision has no linear classifier to take off; choose another"
    )


def _timm(tower: ImageTower, image_size: int) -> tuple[nn.Module, int]:
    name = tower.name.partition("/")[2]
    if ":" in name:
        raise UserError(
            f"model.image.name: expected the name of a timm architecture, got timm/{name}, which names a "
            "download; give the architecture, and model.image.weights a local file"
        )
    try:
        import_torchvision()
        import timm
    except ImportError as error:
        raise UserError(f"model.image.name: timm/{name} needs timm: pip install timm ({error})") from error
    if not timm.is_model(name):
        raise UserError(f"model.image.name: timm has no model {name}{did_you_mean(name, timm.list_models(), 3)}")
    for key in sorted(_SEEN_TO.keys() & tower.options.keys()):
        raise UserError(f"model.image.options.{key}: {_SEEN_TO[key]}; expected another keyword of timm/{name}")
    config = timm.get_pretrained_cfg(name)
    sized = {"img_size": image_size} if config is not None and config.fixed_input_size else {}
    try:
        try:
            module: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **sized, **tower.options)
        except TypeError:  # a size that is fixed by the weights, not by the architecture
            module = timm.create_model(name, pretrained=False, num_classes=0, **tower.options)
    except TypeError as error:
        raise UserError(
            f"model.image.options: timm/{name} does not take {', '.join(tower.options) or 'none'}: {error}"
        ) from error
    except (ValueError, AssertionError) as error:
        raise SizeError(f"timm/{name}", image_size, error) from error
    return module, int(getattr(module, "head_hidden_size", None) or cast(Tensor, module.num_features))


# Keywords of timm's that other keys stand for.
_SEEN_TO = {
    "img_size": "data.image_size says it",
    "num_classes": "a tower has no classifier",
    "in_chans": "pictures have three channels",
    "pretrained": "nothing is downloaded, and model.image.weights names a local file",
    "checkpoint_path": "model.image.weights names a local file",
}

# By name, or by KIND/NAME for a library's: from the section and the side of the images in pixels to the tower and its
# width. Weights and normalisation are seen to afterwards, alike for all.
IMAGE_TOWERS: dict[str, Build] = {
    "small_resnet": _small_resnet,
    "torchvision/NAME": _torchvision,
    "timm/NAME": _timm,
    "transformers/NAME": vision_tower,
    "open_clip/NAME": open_clip_towers.vision_tower,
}

# Those of which a section and a size say all: no files, nothing that somebody added.
_SETTLED = (_small_resnet, _torchvision, _timm)
_TRIED: dict[tuple[Build, str, int, bool], Found] = {}

# Libraries whose towers can be built from a description, without what their name stands for.
DESCRIBED = {"transformers": vision_tower, "open_clip": open_clip_towers.vision_tower}
