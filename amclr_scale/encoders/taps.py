"""Features of inner layers: what named modules of a tower give, or get, as one row for each sample, each with a head.

A tap reads its module while the tower runs, in hooks that are there for that forward alone: a second run of a block, to
recompute its activations, finds none. So gradients flow from a tapped tensor as from any other use of it. Where a
module is called several times, the last call counts.

n  samples    L  tokens    C  channels    F  width of a layer's features

    (n, F)                       as it is
    (n, L, F)                    the mean over tokens, without those of classes in front or padding, or one of them
    (n, C, H, W), (n, H, W, C)   the mean over the map; which of the two it is, a square picture tells
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from amclr_scale.config.schema import ImageTower, Tap, TextTower
from amclr_scale.encoders.heads import build_head
from amclr_scale.encoders.text_towers import PooledTower, TransformersModel, pool
from amclr_scale.encoders.trial import UntriedError, trial
from amclr_scale.errors import UserError, did_you_mean

Form = Literal["row", "tokens", "map", "map, channels last"]


@dataclass(frozen=True)
class Place:
    """Where a tap reads, and what it makes of it.

    Attributes:
        module: the name in the tower.
        width: F.
        classes: tokens in front that are no patches.
    """

    module: str
    of: Literal["input", "output"]
    pooling: Literal["mean", "first", "last"]
    form: Form
    width: int
    classes: int = 0


@dataclass
class Noted:
    """What the modules gave in one forward of a tower."""

    tensors: dict[int, Tensor] = field(default_factory=dict)  # by tap
    visible: Tensor | None = None  # (n, L) bool, of a text tower: what is no padding


class Taps(nn.Module):
    """The taps of one tower."""

    def __init__(self, places: Sequence[Place], heads: Sequence[nn.Module], widths: Sequence[int]):
        """Args:
        heads: (n, F) -> (n, width) each.
        widths: of what the heads give.
        """
        super().__init__()
        self.places, self.widths = tuple(places), tuple(widths)
        self.heads = nn.ModuleList(heads)

    @contextmanager
    def read(self, inputs: Tensor, tower: nn.Module) -> Iterator["Reading"]:
        """Read while the tower runs.

        Args:
            inputs: of the tower; or what it gave, with what was read, (n, width + sum of F), as a frozen tower's waits.
        """
        if inputs.is_floating_point() and inputs.dim() == 2:
            own = [place.width for place in self.places]
            raw, *others = inputs.split([inputs.shape[1] - sum(own), *own], 1)
            yield Reading(raw, self.places, ready=others)
            return
        with noted(tower, [(place.module, place.of) for place in self.places]) as found:
            yield Reading(inputs, self.places, found)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Through the heads."""
        return [head(x) for head, x in zip(self.heads, features, strict=True)]


@dataclass
class Reading:
    """One forward of a tower.

    Attributes:
        inputs: what to give to it.
    """

    inputs: Tensor
    places: Sequence[Place]
    found: Noted = field(default_factory=Noted)
    ready: list[Tensor] | None = None

    def features(self) -> list[Tensor]:
        """Of each tap (n, F), once the tower has run."""
        if self.ready is not None:
            return self.ready
        missing = [place.module for number, place in enumerate(self.places) if number not in self.found.tensors]
        if missing:
            raise UserError(f"model.*.taps: the tower has not called {missing[0]} this time; expected another module")
        return [_pooled(self.found.tensors[n], place, self.found.visible) for n, place in enumerate(self.places)]


@contextmanager
def noted(tower: nn.Module, wanted: Sequence[tuple[str, Literal["input", "output"]]]) -> Iterator[Noted]:
    """Note what modules of a tower give or get while it runs."""
    found, handles = Noted(), []

    def note(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Mapping[str, Any], *output: Any) -> None:
            tensor = _first_tensor(output[0] if output else (*args, *kwargs.values()))
            if tensor is not None:
                found.tensors[number] = tensor

        return hook

    def note_visible(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.visible = args[1]

    for number, (name, of) in enumerate(wanted):
        module = tower.get_submodule(name)
        if of == "output":
            handles.append(module.register_forward_hook(note(number), with_kwargs=True))
        else:  # before ZeRO's hooks, which wrap what comes in
            handles.append(module.register_forward_pre_hook(note(number), with_kwargs=True, prepend=True))
    if isinstance(tower, PooledTower):
        handles.append(tower.tokens.register_forward_pre_hook(note_visible))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return next((one for one in inside if isinstance(one, Tensor) and one.is_floating_point()), None)


def _pooled(x: Tensor, place: Place, visible: Tensor | None) -> Tensor:
    """(n, F), which keeps nothing larger alive."""
    if place.form == "map":
        return x.mean((2, 3))
    if place.form == "map, channels last":
        return x.mean((1, 2))
    if place.form == "row":
        return x
    if visible is not None:
        return pool(x, visible, place.pooling).clone()
    return x[:, 0].clone() if place.pooling == "first" else x[:, place.classes :].mean(1)


def build_taps(
    tower: nn.Module, section: ImageTower | TextTower, *, side: Literal["image", "text"], example: Tensor,
    embedding_width: int,
) -> Taps | None:  # fmt: skip
    """The taps that a section names, with heads; None: it names none.

    Args:
        example: two inputs of the tower.

    Raises:
        UserError: there is no such module, or what it gives is not a row, tokens or a map for each sample.
    """
    if not section.taps:
        return None
    inner = _inner(tower)
    prefix = next(name for name, module in tower.named_modules() if module is inner)
    names = [f"{prefix}.{tap.module}".strip(".") for tap in section.taps]
    known = [name for name, _ in inner.named_modules() if name]
    for tap in section.taps:
        if tap.module not in known:
            there, near = ", ".join(_ranges(known)), did_you_mean(tap.module, known)
            raise UserError(
                f"model.{side}.taps: {section.name} has no module {tap.module}{near}; it has {there or 'none'}"
            )
    try:
        with noted(tower, [(name, tap.of) for name, tap in zip(names, section.taps, strict=True)]) as found:
            trial(tower, example)
    except UntriedError as error:
        raise UserError(
            f"model.{side}.taps: {section.name} cannot be looked at without its weights; expected none"
        ) from error
    places = [
        _place(tower, name, tap, found.tensors.get(number), found.visible, section, side)
        for number, (name, tap) in enumerate(zip(names, section.taps, strict=True))
    ]
    heads: list[nn.Module] = []
    widths = []
    for place, tap in zip(places, section.taps, strict=True):
        heads.append(
            nn.Identity() if tap.head == "none" else build_head(tap.head, place.width, embedding_width, section.dropout)
        )
        widths.append(place.width if tap.head == "none" else embedding_width)
    return Taps(places, heads, widths)


def check_pairs(image: Taps | None, text: Taps | None) -> None:
    """Refuse layers whose features of images and of texts have different widths."""
    widths = zip(image.widths if image else (), text.widths if text else (), strict=False)
    for number, (ours, theirs) in enumerate(widths):
        if ours != theirs:
            raise UserError(
                f"model.text.taps.{number}: expected features as wide as those of model.image.taps.{number}, {ours}, "
                f"got {theirs}; give both a head, linear or mlp"
            )


def _inner(tower: nn.Module) -> nn.Module:
    """The module whose names a user knows: of a library's model, that model."""
    inner = tower.tokens if isinstance(tower, PooledTower) else tower
    return inner.model if isinstance(inner, TransformersModel) else inner


def _place(
    tower: nn.Module, name: str, tap: Tap, tensor: Tensor | None, visible: Tensor | None,
    section: ImageTower | TextTower, side: str,
) -> Place:  # fmt: skip
    key = f"model.{side}.taps: {tap.module} of {section.name}"
    if tensor is None:
        raise UserError(f"{key}: expected a module that the tower calls with tensors, got one that it does not")
    shape = tuple(tensor.shape)
    of_text = isinstance(tower, PooledTower)
    tokens = visible.shape[1] if visible is not None else None
    form: Form | None = None
    if len(shape) == 2 and shape[0] == 2:
        form = "row"
    elif len(shape) == 3 and shape[0] == 2 and tokens in (None, shape[1]):
        form = "tokens"
    elif len(shape) == 4 and shape[0] == 2 and not of_text:
        last = shape[1] == shape[2] != shape[3] or getattr(tower, "output_fmt", "NCHW") == "NHWC"
        form = "map, channels last" if last else "map" if shape[2] == shape[3] else None
    if form is None:
        raise UserError(f"{key}: expected (2, width), (2, tokens, width) or a square map for two samples, got {shape}")
    classes = _class_tokens(tower, shape[1]) if form == "tokens" and not of_text else 0
    own = tower.pooling if isinstance(tower, PooledTower) else "mean"
    pooling = tap.pooling if tap.pooling != "default" else "mean" if own == "model" else own
    if not of_text and (pooling == "last" or (pooling == "first" and not classes)):
        raise UserError(f"{key}: pooling: expected mean, for there is no such token, got {pooling}")
    width = shape[1] if form == "map" else shape[-1]
    return Place(name, tap.of, pooling, form, width, classes)


# Parameters of libraries' towers that stand in front of patches as tokens: (D,), or (1, tokens, D).
_IN_FRONT = ("class_token", "cls_token", "class_embedding", "register_tokens", "distillation_token")


def _class_tokens(tower: nn.Module, tokens: int) -> int:
    """Of so many tokens, those in front of patches: timm counts them, others have parameters for them.

    A square picture has a square number of patches; where all tokens are one, none is in front yet.
    """
    inner = getattr(tower, "model", None)
    counts = (getattr(one, "num_prefix_tokens", None) for one in (tower, inner, getattr(inner, "trunk", None)))
    named = (p for name, p in tower.named_parameters() if name.rpartition(".")[2] in _IN_FRONT)
    counted = next((n for n in counts if isinstance(n, int)), sum(p.numel() // p.shape[-1] for p in named))
    patches = tokens - counted
    return 0 if patches < 1 or (_is_square(tokens) and not _is_square(patches)) else counted


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _ranges(names: Sequence[str]) -> list[str]:
    """Names, with those that differ in numbers alone as one: blocks.0-11.attn."""

    def shape(name: str) -> str:
        return re.sub(r"(?<![^.])\d+(?![^.])", "#", name)

    found: dict[str, list[list[int]]] = {}
    for name in names:
        found.setdefault(shape(name), []).append([int(part) for part in name.split(".") if part.isdigit()])
    lines = []
    for pattern, numbers in found.items():
        line = pattern
        for column in zip(*numbers, strict=True):
            low, high = min(column), max(column)
            line = line.replace("#", str(low) if low == high else f"{low}-{high}", 1)
        lines.append(line)
    return lines
