"""What an objective says about itself before torch is imported: what it reads, and how it counts. Imports no torch.

An objective (objectives/base.py) is a class with `Declarations` below among its bases. The methods here are plain
Python on plain values, so a configuration is checked, a study planned and a report written in milliseconds on a login
node: `config/objective_options.py` takes them, like the options, from the source file, without importing it.

`KINDS` is the one place that says how each kind of input flows. A new kind is one line of it; from there the gradient
cache, the objective's check, the configuration's check, the memory account and the traces know it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

from amclr_scale.errors import did_you_mean


@dataclass(frozen=True)
class Kind:
    """How one kind of input gets to an objective.

    Attributes:
        shape: of one sample's row; letters are D, the embedding width, n, tokens, R, the width of a reference, F,
            that of an inner layer, and K, hard negatives.
        key: of the configuration that provides it; "" where every run has it.
        several: a tuple of such tensors; an objective asks for a number of them, or gives them names of its own.
        shared: one for the whole model rather than a row per sample.
        gradient: the objective's gradient flows back into it.
        dtype: of its numbers.
    """

    shape: tuple[str | int, ...] = ()
    key: str = ""
    several: bool = False
    shared: bool = False
    gradient: bool = True
    dtype: Literal["float", "int64", "bool"] = "float"


KINDS: dict[str, Kind] = {
    "image": Kind(("D",)),
    "text": Kind(("D",)),
    "ids": Kind(gradient=False, dtype="int64"),  # position in the data set
    "text_ids": Kind(gradient=False, dtype="int64"),  # where an image has several captions
    "text_content": Kind(gradient=False, dtype="int64"),  # a number of the caption's words: equal where they are
    "logit_scale": Kind((1,), shared=True),  # 1 / temperature
    "logit_bias": Kind((1,), shared=True),
    "image_views": Kind(("D",), "data.image_views", several=True),  # further views of the same samples
    "text_views": Kind(("D",), "data.text_views", several=True),
    "image_negatives": Kind(("D",), "data.image_negatives", several=True),  # hard ones, made for each sample
    "text_negatives": Kind(("D",), "data.text_negatives", several=True),
    "image_negative_mask": Kind(("K",), "data.image_negatives", gradient=False, dtype="bool"),  # True: it is there
    "text_negative_mask": Kind(("K",), "data.text_negatives", gradient=False, dtype="bool"),
    "labels": Kind((), "data.labels", gradient=False, dtype="int64"),
    "image_reference": Kind(("R",), "data.image_reference", gradient=False),  # of a frozen model
    "text_reference": Kind(("R",), "data.text_reference", gradient=False),
    "image_momentum": Kind(("D",), "model.momentum", gradient=False),  # of a moving average of the towers
    "text_momentum": Kind(("D",), "model.momentum", gradient=False),
    "image_layers": Kind(("F",), "model.image.taps", several=True),  # of inner layers
    "text_layers": Kind(("F",), "model.text.taps", several=True),
    "image_momentum_layers": Kind(("F",), "model.image.taps", several=True, gradient=False),  # of model.momentum's
    "text_momentum_layers": Kind(("F",), "model.text.taps", several=True, gradient=False),
    "image_tokens": Kind(("n", "D")),  # of patches: towers give them where they are asked for (encoders/tokens.py)
    "text_tokens": Kind(("n", "D")),
    "image_token_mask": Kind(("n",), gradient=False, dtype="bool"),  # True: it is there
    "text_token_mask": Kind(("n",), gradient=False, dtype="bool"),
}


class Inputs(dict[str, int | tuple[str, ...]]):
    """What `inputs_of` asks for beside image and text: name in `KINDS` -> how many, or names for them.

    Raises:
        TypeError: an objective asks for what is not in `KINDS`, or in another way than its kind allows.
    """

    def __init__(self, asked: Mapping[str, Any]):
        super().__init__()
        own = list[str]()
        for name, wanted in asked.items():
            if name not in KINDS:
                raise TypeError(f"inputs_of: no kind of input is called {name!r}{did_you_mean(name, KINDS)}")
            value = tuple(wanted) if isinstance(wanted, list) else wanted
            match KINDS[name].several, value:
                case (True, tuple()) if all(isinstance(one, str) for one in value):
                    own += value
                case (True, int()) if value >= 0 and not isinstance(value, bool):
                    pass
                case (False, bool()):
                    value = int(value)
                case (several, _):
                    fits = "a number of them, or a tuple of names" if several else "True or False"
                    raise TypeError(f"inputs_of: {name}: expected {fits}, got {value!r}")
            if value:
                self[name] = value
        if len({*own, *KINDS}) < len(own) + len(KINDS):
            raise TypeError(f"inputs_of: expected names of its own, each once, got {', '.join(own)}")

    def count(self, name: str) -> int:
        """How many of a kind; 0 where it is not asked for."""
        value = self.get(name, 0)
        return value if isinstance(value, int) else len(value)

    def own_names(self) -> Iterable[tuple[str, str, int]]:
        """Names that the objective gives: (its name, kind, which one of that kind)."""
        for kind, value in self.items():
            for number, own in enumerate(value if isinstance(value, tuple) else ()):
                yield own, kind, number


def unread_keys(inputs: Inputs) -> list[str]:
    """Keys of `data` that give such an objective nothing, though others read them; those of numbers aside."""
    aside = {KINDS[name].key for name in inputs} | {kind.key for kind in KINDS.values() if kind.several}
    keys = (kind.key for kind in KINDS.values() if kind.key not in aside)
    return [key.removeprefix("data.") for key in keys if key.startswith("data.")]


class Equal(NamedTuple):
    """Another objective whose gradient is the same, up to a factor."""

    name: str
    options: Mapping[str, Any]  # that differ from its defaults
    why: str


def queue_of(options: Any) -> Mapping[str, Any]:
    """The option `queue` as a mapping with a size, 0 where there is none."""
    found = getattr(options, "queue", None)
    if found is None:
        return {"size": 0}
    given = found if isinstance(found, Mapping) else vars(found)
    return {"size": 65_536, "source": "student", **given}


def read_by_masks(options: Any) -> Mapping[str, Any]:
    """What `inputs_of` asks for where the objective has the options mask_duplicates and queue."""
    masked, queue = options.mask_duplicates, queue_of(options)
    momentum = bool(queue["size"]) and queue["source"] == "momentum"
    return {
        "ids": masked in ("image", "both") or bool(queue["size"]),
        "text_content": masked in ("text", "both"),
        "image_momentum": momentum,
        "text_momentum": momentum,
    }


def read_by_positives(options: Any) -> Mapping[str, Any]:
    """What `inputs_of` asks for where the option `positives` says which samples are positives of one another."""
    kinds = {"label": "labels", "image": "ids", "text": "text_content"}
    return {kind: options.positives == name for name, kind in kinds.items()}


def with_layers(asked: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """What an objective asks for, and features of inner layers where the option `layers` names weights for some."""
    weights = getattr(options, "layers", None)
    if not weights:
        return dict(asked)
    found = {f"{side}_layers": len(weights) - 1 for side in ("image", "text")}
    of_teacher = {f"{side}_momentum_layers": len(weights) - 1 for side in ("image", "text")}
    return {**asked, **found, **(of_teacher if asked.get("image_momentum") else {})}


def mistakes_of_layers(asked: Mapping[str, Any], options: Any) -> Iterable[str]:
    """What is wrong with the option `layers` of an objective that asks for this, without it."""
    weights = getattr(options, "layers", None)
    if weights is None:
        return
    if len(weights) < 2 or min(weights) <= 0:
        yield f"layers: expected a positive weight of the embeddings and one of each tapped layer, got {list(weights)}"
    others = [kind for kind, wanted in asked.items() if wanted and (KINDS[kind].several or "n" in KINDS[kind].shape)]
    if others:
        yield f"layers: expected null, for inner layers have no {others[0]}, which are read too, got {list(weights)}"


class Declarations:
    """The declarations of an objective, with what holds where it says nothing.

    Every method is a `@staticmethod` of options (with the option values as attributes) and plain numbers. It is run
    from the source file alone: it may use builtins, `math` and the names of this module, nothing else of its file.
    Inheritance works.
    """

    group_option: ClassVar[str | None] = None
    """The option that counts pairs of the global batch which share negatives; null: all do."""
    drawn_option: ClassVar[str | None] = None
    """The option that says how many stored rows are drawn for a step, where `stored_rows_of` is that number."""

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        """What it reads beside image and text, such as {"ids": True, "image_views": 2, "labels": True}.

        Names for several of a kind, {"image_views": ("near", "far")}, are then attributes of `Embeddings`. By default
        what the options of masking.py ask for, where it has them.
        """
        return read_by_masks(options) if hasattr(options, "mask_duplicates") else {}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        """Negatives that an anchor meets in a term, at a global batch of B; of the direction that has more."""
        return B - 1

    @staticmethod
    def stored_rows_of(options: Any) -> int | Literal["all"]:
        """Stored rows of the data set's samples that a step compares with: so many, or those of all samples.

        Such an objective is made for no smaller data set, and with "all" a step costs the more the larger the set is.
        """
        return 0

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        """Another objective that computes the same at a global batch of B: studies check that they agree."""
        return None

    @staticmethod
    def mistakes_of(options: Any, B: int, b: int) -> Iterable[str]:
        """What would fail at a global batch of B with b of it on a rank: lines such as "size: expected ..., got ...".

        The option to change comes first.
        """
        return ()
