"""What flows between the parts of the toolkit, with shapes.

b  samples on this rank    B = b W  samples of the global batch    D  embedding width    L  tokens    V  further views

Data makes a `Batch`, the encoders turn it into `Embeddings`, an objective turns those into a `Loss`. Between the model
and the objective everything has a flat name: `image`, `image_views.0`, and `shared.prototypes` for what a part of an
objective gives once for all samples. `declarations.KINDS` says how each kind flows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from amclr_scale.declarations import KINDS
from amclr_scale.errors import UserError

Several = tuple[Tensor, ...]
Outputs = Mapping[str, Any]  # a Tensor, several of them, or, under "shared", a mapping of tensors


@dataclass(frozen=True)
class Batch:
    """The samples of one rank, every view of them.

    `images[0]` and `texts[0]` are the pair itself; the others are further views of the same samples, in the
    order in which the recipe names them.
    """

    ids: Tensor  # (b,) int64, position in the data set: unique, stable over epochs, ranks and restarts
    images: Several  # 1 + V of (b, 3, H, W), uint8 (or float in [0, 1])
    texts: Several  # 1 + V of (b, L) int64 token ids
    text_ids: Tensor | None = None  # (b,) int64, where an image has several captions; None: the same as ids
    given: Mapping[str, Tensor] = field(default_factory=dict)  # (b, ...) that no tower reads, such as labels

    def __len__(self) -> int:
        return len(self.ids)

    def beside(self) -> dict[str, Tensor]:
        """What goes to the objective as it is: ids, what captions are known by, and what is given."""
        found = {"ids": self.ids, "text_content": content(self.texts[0]), **self.given}
        return found if self.text_ids is None else {**found, "text_ids": self.text_ids}


def content(tokens: Tensor) -> Tensor:
    """A number of each row's tokens, (b,) int64 of at least 0: equal for equal rows, and hardly ever for others.

    Two rows that differ agree with a probability of about 2^-63: 2^-33 for some pair of 32,768 rows.

    Args:
        tokens: (b, L) int64.
    """
    tokens = tokens.flatten(1).long()
    places = torch.arange(tokens.shape[1], device=tokens.device)
    x = _scrambled(tokens + _scrambled(places)).sum(1)  # integers wrap around
    return _scrambled(x) & (2**63 - 1)


def _scrambled(x: Tensor) -> Tensor:
    """The finalizer of Steele et al.'s SplitMix64 (OOPSLA 2014)."""
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return x


def flatten(outputs: Outputs) -> dict[str, Tensor]:
    """Flat names: `image_views: (a, b)` becomes `image_views.0: a, image_views.1: b`; mappings alike."""
    flat: dict[str, Tensor] = {}
    for name, value in outputs.items():
        if isinstance(value, tuple | list):
            flat |= {f"{name}.{k}": part for k, part in enumerate(value)}
        elif isinstance(value, Mapping):
            flat |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            flat[name] = value
    return flat


def is_shared(name: str) -> bool:
    """Whether a flat name is of the whole model, rather than a row per sample."""
    first = name.partition(".")[0]
    return first == "shared" or (first in KINDS and KINDS[first].shared)


FROZEN_FEATURES = "frozen_features"  # what towers gave that are frozen: for the engine, no objective sees it


def frozen_side(name: str) -> str | None:
    """Of which side a flat name is a frozen tower's features; None: of something else."""
    first, _, side = name.partition(".")
    return side if first == FROZEN_FEATURES else None


def takes_gradient(name: str) -> bool:
    """Whether an objective's gradient flows back into what has this flat name."""
    first = name.partition(".")[0]
    return first not in KINDS or KINDS[first].gradient


class MissingInputError(UserError, AttributeError):
    """An objective reads what is not in its embeddings."""


@dataclass(frozen=True, init=False)
class Embeddings:
    """What the model gives an objective: this rank's rows, and whatever else the objective reads.

    All rows are unit length. Everything that the model makes is an output of its forward, so the gradient cache treats
    all of it alike. What an objective has asked for by `inputs_of`, names of its own for views, and outputs of its
    parts are attributes beside the fields: `embeddings.labels`, `embeddings.prototypes`.

    Args:
        shared: outputs of parts that are one for all samples, by name.
        given: everything else, (b, ...) each, by name.
    """

    image: Tensor  # (b, D)
    text: Tensor  # (b, D)
    ids: Tensor | None  # (b,) int64
    text_ids: Tensor | None  # (b,) int64; None: the same as ids
    logit_scale: Tensor | None  # (1,), 1 / temperature (not its logarithm)
    logit_bias: Tensor | None  # (1,), SigLIP
    image_views: Several  # V of (b, D)
    text_views: Several  # V of (b, D)
    shared: Mapping[str, Tensor]
    given: Mapping[str, Tensor | Several]

    def __init__(
        self,
        image: Tensor,
        text: Tensor,
        ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        logit_scale: Tensor | None = None,
        logit_bias: Tensor | None = None,
        image_views: Several = (),
        text_views: Several = (),
        shared: Mapping[str, Tensor] | None = None,
        given: Mapping[str, Tensor | Several] | None = None,
        **more: Tensor | Several,
    ):
        fields = {"image": image, "text": text, "ids": ids, "text_ids": text_ids, "logit_scale": logit_scale}
        fields |= {"logit_bias": logit_bias}
        lists = {"image_views": image_views, "text_views": text_views}
        there = {name: value for name, value in {**(given or {}), **more}.items() if value is not None}
        maps = {"shared": dict(shared or {}), "given": there}
        for name, value in (*fields.items(), *lists.items(), *maps.items()):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in self.__dataclass_fields__:
            raise AttributeError(name)  # a copy on its way
        for found in (self.given, self.shared):
            if name in found:
                return found[name]
        there = ", ".join([*flatten(self.given), *self.shared]) or "none"
        raise MissingInputError(
            f"embeddings.{name}: the objective reads it, got nothing (there are {there}); ask for it in inputs_of, or, "
            "where the objective's parts make it, give the model its model_parts, and encode images and texts together "
            "(execution.text_micro_batch_size: null) where they read both"
        )

    def flat(self) -> dict[str, Tensor]:
        """Every tensor by its flat name."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("given", "shared")}
        there = {name: value for name, value in fields.items() if value is not None}
        return flatten({**there, **self.given, "shared": self.shared})

    @classmethod
    def from_flat(cls, flat: Mapping[str, Tensor]) -> "Embeddings":
        """Embeddings with these tensors."""
        found: dict[str, Any] = {}
        shared: dict[str, Tensor] = {}
        for name, tensor in flat.items():
            first, _, rest = name.partition(".")
            if first == "shared":
                shared[rest] = tensor
            elif rest:
                found[first] = (*found.get(first, ()), tensor)
            else:
                found[name] = tensor
        return cls(**found, shared=shared)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> "Embeddings":
        """`change(flat name, tensor)` in place of each tensor."""
        return Embeddings.from_flat({name: change(name, tensor) for name, tensor in self.flat().items()})


@dataclass(frozen=True)
class Loss:
    """What an objective returns: the number to differentiate, and plain numbers to log.

    `value` is this rank's mean over its own rows (distributed/collectives.py states the rule). Where the number
    that is differentiated is a surrogate, `metrics["objective"]` holds the objective's own value.
    """

    value: Tensor  # ()
    metrics: Mapping[str, float] = field(default_factory=dict)
