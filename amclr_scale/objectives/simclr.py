"""NT-Xent: two views of the same modality are each other's positive among all views of the batch; and SLIP.

SimCLR: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020,
arXiv:2002.05709. SLIP: Mu et al., "SLIP: Self-supervision Meets Language-Image Pre-training", ECCV 2022,
arXiv:2112.12750.

With views z and z' of every sample, of all ranks, and x = s / t:

    L_i   = log( sum_j exp(x(z_i, z'_j)) + sum_{j != i} exp(x(z_i, z_j)) ) - x(z_i, z'_i)       2 B - 1 keys
    value = (1/2) mean_i (L_i + L'_i)                                                           L' has z' for anchors

    SLIP  = CLIP(image, text) + intra_image NT-Xent(two further image views) + intra_text NT-Xent(two further texts)

Numerics: three contrasts whose log-sums are joined by logaddexp, centred on the positive; float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Objective, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions, limited
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class SimCLR(Objective, name="simclr"):
    """NT-Xent over two views of one modality: the unimodal reference, without texts or without images."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `simclr`."""

        temperature: float | None = 0.1  # fixed; null: learned, 1 / logit_scale
        modality: Literal["image", "text"] = "image"  # whose view is compared with a further one

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.queue is None, "queue", "null: views of one modality meet no queue here", self.queue)
            check_temperature(self.temperature)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), f"{options.modality}_views": 1}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return 2 * B - 2

    def forward(self, embeddings: Embeddings) -> Loss:
        t = learned_temperature(embeddings, self.config.temperature)
        first: Tensor = getattr(embeddings, self.config.modality)
        second: Tensor = getattr(embeddings, f"{self.config.modality}_views")[0]
        loss = nt_xent(first, second, t, self.config.masks(embeddings).of())
        return Loss(loss, numbers(objective=loss, temperature=t))


class SLIP(Objective, name="slip"):
    """CLIP, and NT-Xent between two further views inside a modality."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `slip`."""

        temperature: float | None = None  # of CLIP's part: fixed; null: learned, 1 / logit_scale
        intra_temperature: float = 0.1  # of the parts inside modalities
        intra_image: float = 1.0  # weight of the part inside images; 0: none, and no image views
        intra_text: float = 0.0  # weight of the part inside texts

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.intra_temperature > 0, "intra_temperature", "a positive number", self.intra_temperature)
            for key in ("intra_image", "intra_text"):
                require(getattr(self, key) >= 0, key, "a weight of at least 0", getattr(self, key))

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        views = {f"{side}_views": 2 * bool(getattr(options, f"intra_{side}")) for side in ("image", "text")}
        return {**read_by_masks(options), **views}

    def forward(self, embeddings: Embeddings) -> Loss:
        config, e = self.config, embeddings
        t = learned_temperature(e, config.temperature)
        masks = config.masks(e).of()  # a queue is CLIP's
        clip = softmax_loss(contrast(e.image, e.text, temperature=t, centred=True, **self.masks(e).of()))
        inside = clip.new_zeros(())
        for weight, views in ((config.intra_image, e.image_views), (config.intra_text, e.text_views)):
            if weight:
                inside = inside + weight * nt_xent(views[0], views[1], config.intra_temperature, masks)
        loss = clip + inside
        return Loss(loss, numbers(objective=loss, clip=clip, intra=inside, temperature=t))


def nt_xent(first: Tensor, second: Tensor, temperature: Tensor | float, masks: Mapping[str, Any]) -> Tensor:
    """The value above, of two views (b, D): a tensor (), this rank's mean."""
    sides = of_two_views(first, second, temperature, masks)
    return (sides[0] + sides[1]).mean() / 2


def of_two_views(
    first: Tensor, second: Tensor, temperature: Tensor | float, masks: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Log-sums (b,) of the anchors of either view over all other rows of both, less the logit of their pair.

    Args:
        first, second: (b, D).
        temperature: of all anchors.
        masks: what `contrast` is told of groups and margins.
    """
    across = contrast(first, second, temperature=temperature, centred=True, **masks)
    masks = limited(masks, across.image.positive)
    found: list[Tensor] = []
    for view, side in ((first, across.image), (second, across.text)):
        inside = contrast(view, view, temperature=temperature, exclude_positive=True, **masks).image
        found.append(torch.logaddexp(side.log_sum, inside.log_sum - side.positive / temperature))
    return found[0], found[1]
