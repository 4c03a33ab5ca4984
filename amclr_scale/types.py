"""What flows between the parts of the toolkit, with shapes.

b  samples on this rank    B = b W  samples of the global batch    D  embedding width    L  tokens    V  further views

Data makes a `Batch`, the encoders turn it into `Embeddings`, an objective turns those into a `Loss`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The samples of one rank, every view of them.

    `images[0]` and `texts[0]` are the pair itself; the others are further views of the same samples, in the
    order in which the recipe names them.
    """

    ids: Tensor  # (b,) int64, position in the data set: unique, stable over epochs, ranks and restarts
    images: tuple[Tensor, ...]  # 1 + V of (b, 3, H, W), uint8 (or float in [0, 1])
    texts: tuple[Tensor, ...]  # 1 + V of (b, L) int64 token ids
    text_ids: Tensor | None = None  # (b,) int64, where an image has several captions; None: the same as ids

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Embeddings:
    """What the model gives an objective: this rank's rows, and whatever is learned that the objective needs.

    All rows are unit length. Everything but the ids is an output of the model's forward, so the gradient cache
    treats all of it alike. Fields that an objective does not use are None or ().
    """

    image: Tensor  # (b, D)
    text: Tensor  # (b, D)
    ids: Tensor | None = None  # (b,) int64
    text_ids: Tensor | None = None  # (b,) int64; None: the same as ids
    logit_scale: Tensor | None = None  # (1,), 1 / temperature (not its logarithm)
    logit_bias: Tensor | None = None  # (1,), SigLIP
    image_views: tuple[Tensor, ...] = ()  # V of (b, D)
    text_views: tuple[Tensor, ...] = ()  # V of (b, D)
    image_temperature: Tensor | None = None  # (b,), generated per sample
    text_temperature: Tensor | None = None  # (b,)


@dataclass(frozen=True)
class Loss:
    """What an objective returns: the number to differentiate, and plain numbers to log.

    `value` is this rank's mean over its own rows (distributed/collectives.py states the rule). Where the number
    that is differentiated is a surrogate, `metrics["objective"]` holds the objective's own value.
    """

    value: Tensor  # ()
    metrics: Mapping[str, float] = field(default_factory=dict)
