"""Tokens: features of patches and of words, beside those of the whole image and caption, where an objective reads them.

m  samples    n  tokens of a sample

An image tower's tokens are the last map or sequence of its own width that it makes before it pools it: patches of a
transformer, with a class token where it has one, or places of a convolutional map. A text tower's are its features of
all tokens that are no padding. They go through the tower's own head, so a tower has the same weights with and without.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from amclr_scale.errors import UserError

Side = Literal["image", "text"]
SIDES: tuple[Side, ...] = ("image", "text")


@dataclass(frozen=True)
class Place:
    """Where an image tower has its tokens.

    Attributes:
        tower: its name, as the configuration has it.
        module: the name, inside the tower, of what gives them; "" where nothing does.
        count: n, with nothing dropped.
        width_first: they are a map (m, width, h, w), or else (m, ..., width).
    """

    tower: str
    module: str = ""
    count: int = 0
    width_first: bool = False

    @contextmanager
    def noted(self, tower: nn.Module) -> Iterator[list[Tensor]]:
        """While the tower runs, note what it has there.

        The hook is the last one, and there for one forward: under ZeRO's stage 3 the tokens then come with whatever
        fetches this module's parameters for backward.
        """
        found: list[Tensor] = []
        handle = tower.get_submodule(self.module).register_forward_hook(lambda _, inputs, out: found.append(out))
        try:
            yield found
        finally:
            handle.remove()

    def rows(self, found: Tensor) -> Tensor:
        """(m, n, width)."""
        return found.flatten(2).transpose(1, 2) if self.width_first else found.flatten(1, -2)


class TokenSearch:
    """Watches one forward of a tower for the last features before its pooling.

    Args:
        samples: of that forward.
    """

    def __init__(self, tower: nn.Module, samples: int):
        self.samples = samples
        self._seen: list[tuple[str, tuple[int, ...]]] = []
        self._hooks = [part.register_forward_hook(self._look(name)) for name, part in tower.named_modules() if name]

    def _look(self, name: str) -> Callable[[nn.Module, object, object], None]:
        def note(_: nn.Module, inputs: object, out: object) -> None:
            if isinstance(out, Tensor) and out.is_floating_point():
                self._seen.append((name, tuple(out.shape)))

        return note

    def close(self) -> None:
        """Watch no longer."""
        for hook in self._hooks:
            hook.remove()

    def place(self, tower: str, width: int) -> Place:
        """Where they are, in a tower of this name and width."""
        for name, (samples, *shape) in reversed(self._seen):
            if samples != self.samples or len(shape) not in (2, 3):
                continue
            for width_first in (True, False) if len(shape) == 3 else (False,):
                count = math.prod(shape[1:] if width_first else shape[:-1])
                if shape[0 if width_first else -1] == width and count > 1:
                    return Place(tower, name, count, width_first)
        return Place(tower)


def token_sides(inputs: Mapping[str, object]) -> tuple[Side, ...]:
    """Of which sides an objective that reads these inputs needs tokens."""
    return tuple(side for side in SIDES if inputs.keys() & {f"{side}_tokens", f"{side}_token_mask"})


def check_tokens(sides: Iterable[Side], place: Place | None) -> None:
    """Raise `UserError` if tokens of images are asked of a tower that has none."""
    if "image" in sides and (place is None or not place.module):
        named = "this tower" if place is None else place.tower
        raise UserError(
            f"model.image.name: image_tokens are asked for (objective.name, evaluation.evaluators), and {named} has no "
            "features of patches before its pooling; expected such as small_resnet or timm/vit_small_patch16_224"
        )
