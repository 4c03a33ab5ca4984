"""A trained model to use: pictures and captions in, unit vectors out."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from amclr_scale.checkpoint.cached import local_copy
from amclr_scale.checkpoint.files import CHECKPOINTS, read_state
from amclr_scale.checkpoint.remote import is_url, name_in
from amclr_scale.checkpoint.state import OBJECTIVE, TOKENIZER
from amclr_scale.data.decoding import BadSampleError, Sample, decode
from amclr_scale.data.reading import reading_of
from amclr_scale.distributed.process_group import named_device
from amclr_scale.errors import UserError
from amclr_scale.evaluation.models import Loaded, load_model
from amclr_scale.evaluation.suites.files import of_model
from amclr_scale.trained.export import export

DIGEST = "model_sha256"  # what is written down of a model beside embeddings that it made
ROUNDING = 0.01  # by which floats may leave [0, 1]: of a resizing, of bf16
Images = Sequence[Any] | Tensor | str | Path | Image.Image


class Model:
    """`encode_image` and `encode_text`.

    Attributes:
        config: of the run that trained it.
        reading: how it reads pictures and captions.
        tokenizer: captions -> (n, L) int64.
        module: the towers, in evaluation mode: `module(images=(...,), texts=(...,))`.
    """

    def __init__(self, loaded: Loaded, device: torch.device):
        self.config, self.module, self.device = loaded.config, loaded.model.to(device), device
        squash = self.config.evaluation.resize == "squash"
        self.reading = loaded.reading or reading_of(self.config.data, squash=squash)
        self.tokenizer = self.reading.tokenizer

    def digest(self) -> str:
        """SHA-256 of the weights, and of how pictures and captions are read: the same for an export and its run."""
        return of_model(self.module, self.reading)

    @torch.no_grad()
    def encode_image(self, images: Images, batch_size: int = 64) -> Tensor:
        """Embed pictures, (n, D), unit length, on the CPU.

        Args:
            images: files or PIL images, which are resized and cropped as in evaluation, or a tensor (n, 3, H, W) of
                the model's size, uint8 or float in [0, 1]. A file, an image or a tensor (3, H, W) by itself is one.

        Raises:
            UserError: a file is no image that can be read, or something else was given.
        """
        _check_batch_size(batch_size)
        if isinstance(images, Tensor):
            images = images[None] if images.dim() == 3 else images
            _check_pixels(images, self.config.data.image_size)
        else:
            images = [images] if isinstance(images, str | Path | Image.Image) else list(images)
        rows = []
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            if isinstance(part, Tensor):
                batch = part
            else:
                batch = torch.stack([self.pixels(image, start + i) for i, image in enumerate(part)])
            rows.append(self.module(images=(batch.to(self.device),))["image"].cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.config.model.embedding_width)

    @torch.no_grad()
    def encode_text(self, texts: Sequence[str] | str, batch_size: int = 256) -> Tensor:
        """Embed captions, (n, D), unit length, on the CPU. A string by itself is one caption.

        Raises:
            UserError: something else than strings was given.
        """
        _check_batch_size(batch_size)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if strange := [text for text in texts if not isinstance(text, str)]:
            raise UserError(f"texts: expected strings, got {strange[0]!r}")
        rows = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            rows.append(self.module(texts=(tokens.to(self.device),))["text"].cpu())
        return torch.cat(rows) if rows else torch.empty(0, self.config.model.embedding_width)

    def pixels(self, image: Any, position: int = 0) -> Tensor:
        """One picture as the image tower takes it, uint8 (3, H, W).

        Args:
            position: of several, from 0, for messages about what has no name.

        Raises:
            UserError: it cannot be used, and why.
        """
        data = self.config.data
        name = (
            image if isinstance(image, str | Path) else getattr(image, "filename", "")
        ) or f"number {position} (from 0)"
        try:
            if isinstance(image, str | Path):
                content = {"jpg": Path(image).read_bytes()}
                opened = Sample(content, data.max_image_pixels, data.max_caption_characters, data.max_image_mib).image()
            elif not isinstance(image, Image.Image):
                raise UserError(f"images: expected files, PIL images or one tensor of all, got {type(image).__name__}")
            else:
                opened = image
            return self.reading.view(decode(opened))
        except (OSError, BadSampleError) as error:
            raise UserError(f"images: {name} cannot be used: {error}") from error


def _check_batch_size(size: int) -> None:
    if size < 1:
        raise UserError(f"batch_size: expected at least 1, got {size}")


def _check_pixels(images: Tensor, size: int) -> None:
    """Pixels in another form would be embedded as well, and as something else.

    Raises:
        UserError: they are no (n, 3, size, size) of uint8 or of floats in [0, 1].
    """
    wanted = f"images: expected a tensor (n, 3, {size}, {size}), uint8 or float in [0, 1]"
    if tuple(images.shape[1:]) != (3, size, size):
        raise UserError(f"{wanted}, got one of shape {tuple(images.shape)}; files and PIL images are resized")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise UserError(f"{wanted}, got {str(images.dtype).removeprefix('torch.')}; .to(torch.uint8), if it is bytes")
    if images.is_floating_point() and images.numel():
        low, high = (float(one) for one in images.aminmax())
        if not (low >= -ROUNDING and high <= 1 + ROUNDING):
            raise UserError(
                f"{wanted}, got floats from {low:g} to {high:g}; the model subtracts its own mean, so give pixels as "
                "they are, divided by 255"
            )


def open_model(name: str) -> Loaded:
    """What `load_model` opens; and a checkpoint, or the newest one of a run, also one in a store, by its address.

    Raises:
        UserError: there is no such model, or it is damaged.
    """
    if is_url(name):  # what is measured of it is written where it would lie
        copy = local_copy(name, "checkpoint")
        return replace(open_model(str(copy.path)), folder=Path("runs") / name_in(name), held=copy)
    path = Path(name).expanduser()
    ended = (path / "weights.safetensors").is_file()
    if ended or not (path.name.startswith("step_") or (path / CHECKPOINTS).is_dir() or path.name == CHECKPOINTS):
        return load_model(name)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = export(path, Path(folder), leaves=False)
        loaded = load_model(folder)
    run, config = checkpoint.parent.parent, loaded.config
    if (checkpoint / TOKENIZER).is_dir():
        spec = str(checkpoint / TOKENIZER)
    else:
        spec = str(read_state(checkpoint)["config"]["data"]["tokenizer"])
    config = config.model_copy(update={"data": config.data.model_copy(update={"tokenizer": spec})})
    name = f"{run.name}/{checkpoint.name}"
    return Loaded(name, loaded.model, config, run, checkpoint.name, checkpoint / OBJECTIVE)


def load(path: str | Path, device: str | torch.device = "cpu") -> Model:
    """A model from a run folder, one of its checkpoints, or a folder that amclr-scale export wrote.

    Raises:
        UserError: there is no such model, it is damaged, or torch has no such device here.
    """
    there = named_device(device)
    return Model(open_model(str(path)), there)
