"""All pairings of the views of a sample: what AmCLR and xAmCLR compare.

With omega further views of every image (z^0 = the image itself, z^1 ... z^omega) and of every text, each entry of

    image list   (z^p, t^q) for p, q = 0 ... omega, p first      then, if intra-modal, (z^0, z^p), (z^p, z^0) for p >= 1
    text list    (t^q, z^p) for q, p = 0 ... omega, q first      then, if intra-modal, (t^0, t^p), (t^p, t^0) for p >= 1

is (anchors, keys) of a centred contrast: the positive of anchor i is row i of the keys, its negatives their other
rows. So no view of a sample is ever a negative of that sample. One matrix of similarities serves an entry of the
image list and its mirror in the text list, or two entries of an intra-modal list.

K = (1 + omega)^2, or with intra-modal entries (1 + omega)^2 + 2 omega, is the length of either list.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from amclr_scale.objectives.base import require
from amclr_scale.objectives.estimator import Centred, centred
from amclr_scale.objectives.masking import NO_MASK, Masking
from amclr_scale.types import Embeddings


@dataclass(frozen=True)
class Pairings:
    """Which lists, and how much an intra-modal entry counts beside a cross-modal one's 1."""

    omega: int
    intra_weight: float | None = None  # None: no intra-modal entries

    def __post_init__(self) -> None:
        require(1 <= self.omega <= 8, "omega", "1 to 8 further views per modality", self.omega)
        weight = self.intra_weight
        require(weight is None or weight > 0, "intra_weight", "a positive weight", weight)

    @property
    def weights(self) -> list[float]:
        """K weights, in list order."""
        intra = [] if self.intra_weight is None else [self.intra_weight] * (2 * self.omega)
        return [1.0] * (1 + self.omega) ** 2 + intra

    def compare(
        self,
        embeddings: Embeddings,
        image_temperature: Tensor | float,
        text_temperature: Tensor | float,
        masking: Masking = NO_MASK,
    ) -> tuple[Centred, Centred]:
        """Statistics of the (image list, text list), each tensor (b, K).

        Args:
            embeddings: with at least omega further views per modality.
            image_temperature: of the image list's entries, one number or (b, K).
            text_temperature: of the text list's.
            masking: what no entry counts among its negatives.
        """
        images = (embeddings.image, *embeddings.image_views[: self.omega])
        texts = (embeddings.text, *embeddings.text_views[: self.omega])

        def image_t(k: int) -> Tensor | float:
            return image_temperature[:, k] if isinstance(image_temperature, Tensor) else image_temperature

        def text_t(k: int) -> Tensor | float:
            return text_temperature[:, k] if isinstance(text_temperature, Tensor) else text_temperature

        views = range(1 + self.omega)
        of_image: dict[int, Centred] = {}
        of_text: dict[int, Centred] = {}
        for p, q in product(views, views):
            i, j = p * len(views) + q, q * len(views) + p
            of_image[i], of_text[j] = centred(images[p], texts[q], (image_t(i), text_t(j)), masking)
        if self.intra_weight is not None:
            for p in views[1:]:
                there = len(views) ** 2 + 2 * (p - 1)
                back = there + 1
                of_image[there], of_image[back] = centred(
                    images[0], images[p], (image_t(there), image_t(back)), masking.among("image")
                )
                of_text[there], of_text[back] = centred(
                    texts[0], texts[p], (text_t(there), text_t(back)), masking.among("text")
                )
        return _side_by_side(of_image), _side_by_side(of_text)


def _side_by_side(entries: dict[int, Centred]) -> Centred:
    order = [entries[k] for k in range(len(entries))]
    return Centred(torch.stack([e.log_g for e in order], 1), torch.stack([e.expected for e in order], 1))
