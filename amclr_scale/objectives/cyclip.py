"""CyCLIP: CLIP plus two penalties that make the geometry of the two modalities agree.

Goel et al., "CyCLIP: Cyclic Contrastive Language-Image Pretraining", NeurIPS 2022, arXiv:2205.14459.

With Z, T the unit rows of all ranks, s = Z T^T:

    in-modal     (lambda_in / B) sum_ij (z_i.z_j - t_i.t_j)^2       two images are as alike as their texts are
    cross-modal  (lambda_cross / B) sum_ij (s_ij - s_ji)^2          s is symmetrical
    value        CLIP + in-modal + cross-modal

Both sums are functions of three D x D matrices, so no B x B matrix is needed. With S = Z + T, R = Z - T:

    ZZ^T - TT^T = (S R^T + R S^T) / 2               ZT^T - TZ^T = (R S^T - S R^T) / 2
    in-modal sum = (tr P Q + tr M M) / 2            cross-modal sum = (tr P Q - tr M M) / 2
    P = S^T S,  Q = R^T R,  M = S^T R

so equal weights, the default, need P and Q only.

With `inmodal`, the contrastive part is the mean of CLIP and (CE(Z, Z') + CE(T, T')) / 2, where CE contrasts the rows
of an embedding with its augmented view.

Numerics: R is small where the modalities agree, so the sums lose nothing to cancellation; all in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.masking import MaskOptions
from amclr_scale.similarity import all_sum, contrast, gram
from amclr_scale.types import Embeddings, Loss


class CyCLIP(Objective, name="cyclip"):
    """CLIP with cyclic consistency inside and between modalities."""

    @dataclass(frozen=True, kw_only=True)
    class Config(MaskOptions):
        """Options of `cyclip`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        lambda_in: float = 0.25  # weight of the in-modal penalty
        lambda_cross: float = 0.25  # weight of the cross-modal penalty
        inmodal: bool = False  # also contrast each modality with an augmented view of itself

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            require(self.lambda_in >= 0, "lambda_in", "a weight of at least 0", self.lambda_in)
            require(self.lambda_cross >= 0, "lambda_cross", "a weight of at least 0", self.lambda_cross)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "image_views": int(options.inmodal), "text_views": int(options.inmodal)}

    def forward(self, embeddings: Embeddings) -> Loss:
        config, image, text = self.config, embeddings.image, embeddings.text
        t = learned_temperature(embeddings, config.temperature)
        masks = self.masks(embeddings)
        both = contrast(image, text, temperature=t, centred=True, **masks.of())
        contrastive = softmax_loss(both)
        if config.inmodal:
            among_images = _cross_entropy(image, embeddings.image_views[0], t, masks.among("image").of())
            among_texts = _cross_entropy(text, embeddings.text_views[0], t, masks.among("text").of())
            contrastive = (contrastive + (among_images + among_texts) / 2) / 2
        cyclic = cyclic_sum(image, text, config.lambda_in, config.lambda_cross) / global_batch_size(image)
        loss = contrastive + cyclic
        return Loss(loss, numbers(objective=loss, contrastive=contrastive, cyclic=cyclic, temperature=t))


def _cross_entropy(anchors: Tensor, keys: Tensor, temperature: Tensor | float, masks: dict[str, Any]) -> Tensor:
    return contrast(anchors, keys, temperature=temperature, centred=True, **masks).image.log_sum.mean()


def cyclic_sum(image: Tensor, text: Tensor, lambda_in: float, lambda_cross: float) -> Tensor:
    """lambda_in times the in-modal plus lambda_cross times the cross-modal sum: a tensor (), the same on all ranks."""
    both, apart = (lambda_in + lambda_cross) / 2, (lambda_in - lambda_cross) / 2
    image, text = at_least_float32(image), at_least_float32(text)  # (b, D)
    with torch.autocast(image.device.type, enabled=False):
        with torch.no_grad():
            s, r = image + text, image - text
            p, q = symmetric(s), symmetric(r)  # (D, D)
            value = both * (p * q).sum()
            to_s, to_r = s @ (2 * both * q), r @ (2 * both * p)  # (b, D), the gradient of value
            if apart:
                m = gram(s, r)
                value += apart * (m * m.T).sum()
                to_s, to_r = to_s + r @ (2 * apart * m), to_r + s @ (2 * apart * m.T)
            to_image, to_text = to_s + to_r, to_s - to_r
        # linear, with that gradient: autograd itself would spend two products on each symmetrical matrix
        linear = image.flatten().dot(to_image.flatten()) + text.flatten().dot(to_text.flatten())
        return value + all_sum(linear - linear.detach())


def symmetric(x: Tensor) -> Tensor:
    """The product gram(x, x), of which the lower left quarter is the upper right one: three quarters of the work."""
    half = x.shape[1] // 2
    top, corner = gram(x[:, :half], x), gram(x[:, half:], x[:, half:])
    return torch.cat([top, torch.cat([top[:, half:].T, corner], 1)])
