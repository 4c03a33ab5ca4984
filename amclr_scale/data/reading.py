"""How a model reads what it is given: pictures become pixels, captions become token ids."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

from PIL import Image
from torch import Tensor

from amclr_scale.config.schema import Data
from amclr_scale.data.augmentation.pictures import Picture
from amclr_scale.data.image_views import evaluation_view, to_tensor
from amclr_scale.data.tokenizers import load_tokenizer


class Tokens(Protocol):
    """Captions -> (n, L) int64, as the model that reads them expects it."""

    def __call__(self, captions: Sequence[str] | str, /) -> Tensor: ...


@dataclass(frozen=True)
class Reading:
    """What goes before a model in evaluation.

    Attributes:
        tokenizer: captions -> (n, L) int64.
        view: a decoded RGB picture -> (3, H, W), uint8, or float in [0, 1]; the model normalises.
    """

    tokenizer: Tokens
    view: Callable[[Picture], Tensor]

    @cached_property
    def blank(self) -> Tensor:
        """(1, 3, H, W): a picture that stands for none."""
        return self.view(Image.new("RGB", (64, 64)))[None]


def reading_of(data: Data, *, squash: bool = False) -> Reading:
    """Of a model of ours.

    Args:
        data: the recipe's section.
        squash: resize both sides of a picture to the square, instead of cutting out its centre.

    Raises:
        UserError: there is no such tokenizer here.
    """
    return Reading(load_tokenizer(data.tokenizer, data.context_length), square_view(data.image_size, squash=squash))


def square_view(size: int, *, squash: bool) -> Callable[[Picture], Tensor]:
    """A picture -> (3, size, size) uint8."""
    return partial(_square, size, squash)


def _square(size: int, squash: bool, picture: Picture) -> Tensor:
    return to_tensor(evaluation_view(picture, size, squash=squash))
