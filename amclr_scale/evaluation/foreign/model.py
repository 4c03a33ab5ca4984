"""Models of other libraries, called like ours: what they have in common, and the proof that they encode as at home.

A picture goes through the library's own resizing and cutting in 8 bits, and the model normalises it, as ours do. What
comes out is compared once, when the model is opened, with what the library itself makes of a picture and two captions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from amclr_scale.config.schema import Config
from amclr_scale.data.augmentation.pictures import Picture
from amclr_scale.data.reading import Reading
from amclr_scale.encoders.dual_encoder import Normalise
from amclr_scale.errors import UserError

PROOF = 1e-5  # unit vectors may differ by so much in each number; shorter ones (all but 0) by as much of their length
CAPTIONS = ["a photo of two cats", " ".join(["a red house on the mat, 2 dogs sleeping"] * 40)]  # the second is cut


class Foreign(nn.Module):
    """A model of another library, called like ours.

    Args:
        encode_image: normalised pixels -> (b, D).
        encode_text: what its tokenizer gives -> (b, D).
        mean, std: of pixels in [0, 1].
    """

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
        self,
        images: tuple[Tensor, ...] = (),
        texts: tuple[Tensor, ...] = (),
        *,
        features: bool = False,
        tokens: bool = False,
    ) -> dict[str, Any]:
        if tokens:
            raise UserError("evaluation.evaluators: token_retrieval compares tokens, which are not known of this model")
        if features:
            raise UserError("evaluation.probes.features: expected embedding, the only features known of this model")
        first = next(self.inner.parameters())
        out: dict[str, Any] = {}
        if images:
            out["image"] = unit(self.encode_image(self.normalise(images[0].to(first.device), first.dtype)))
        if texts:
            out["text"] = unit(self.encode_text(texts[0].to(first.device)))
        return out


def unit(x: Tensor) -> Tensor:
    """Rows of unit length, in float32 at least."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def in_eight_bits(pixels: Tensor) -> Tensor:
    """Pixels in 0 .. 255 as uint8, or in [0, 1] where they are no whole numbers. (3, H, W) -> the same."""
    if pixels.dtype == torch.uint8:
        return pixels
    whole = pixels.round().clamp(0, 255)
    return whole.to(torch.uint8) if torch.equal(whole, pixels) else pixels / 255


def proof_picture() -> Picture:
    """Three to two, with edges and noise: cutting, squashing and every kind of resizing show."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8).repeat(5, 0).repeat(5, 1)
    pixels[:, :100] //= 4
    return Image.fromarray(pixels)


@torch.no_grad()
def prove(name: str, library: str, model: Foreign, reading: Reading, want: dict[str, Tensor]) -> None:
    """Compare the features of the proof's picture and captions with the library's own.

    Args:
        want: image (1, D) and text (2, D) of `proof_picture()` and `CAPTIONS`, unit length.

    Raises:
        UserError: they differ by more than `PROOF`.
    """
    model.eval()
    got = model(images=(reading.view(proof_picture())[None],), texts=(reading.tokenizer(CAPTIONS),))
    apart = {side: _apart(got[side], want[side]) for side in ("image", "text")}
    if not all(value <= PROOF for value in apart.values()):
        raise UserError(
            f"checkpoint: {name}: {type(model.inner).__name__} would not be measured as {library} encodes: features of "
            f"a picture differ by {apart['image']:.1e}, of captions by {apart['text']:.1e} (at most {PROOF:.0e}); this "
            "kind of model cannot be evaluated here"
        )


def _apart(got: Tensor, want: Tensor) -> float:
    """The largest difference of two numbers, as a share of the length of the longest row."""
    if got.shape != want.shape:
        return float("inf")
    return float((got - want).abs().max() / want.norm(dim=1).max())


def foreign_config(tokenizer: str, context_length: int, image_size: int, mean: Any, std: Any) -> Config:
    """What a configuration says about a model of others."""
    data = {
        "tokenizer": tokenizer,
        "context_length": context_length,
        "image_size": image_size,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    return Config.model_validate({"data": data, "train": {"epochs": 1}})
