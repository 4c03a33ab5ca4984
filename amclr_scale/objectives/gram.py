"""GRAM: embeddings of a sample's views span a small volume, those of strangers a large one.

Cicchetti et al., "Gramian Multimodal Representation Learning and Alignment", ICLR 2025, arXiv:2412.11959.

The volume of unit vectors is the root of their Gram determinant. With a_ij = t_i.v_j, b_ij = t_i.w_j, c_j = v_j.w_j for
a text t and the views v, w of an image (or an image and a further text):

    V_ij^2 = (1 - a_ij^2) (1 - c_j^2) - (b_ij - a_ij c_j)^2               two views, without w: V_ij^2 = 1 - a_ij^2
    x_ij   = -sqrt(max(0, V_ij^2) + 1e-6) / t
    L_i    = log sum_j exp(x_ij) - (1 - e) x_ii - e mean_j x_ij           value = (1/2) mean_i (L_i + L'_i)

L' has (v, w) for anchors. A volume does not see signs: a pair that points in opposite directions is as good as one that
agrees.

Numerics: this form of the determinant keeps its digits where vectors nearly agree, unlike 1 + 2abc - a^2 - b^2 - c^2;
1e-6 under the root bounds its slope; rows of similarities in float32, made once.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from amclr_scale.distributed.first_order import first_order_only
from amclr_scale.objectives.base import Objective, at_least_float32, beside, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.similarity import gather, mean_rows
from amclr_scale.types import Embeddings, Loss

LEAST = 1e-6


class GRAM(Objective, name="gram"):
    """Softmax loss on the volume that two or three views of a sample span."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `gram`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        third: Literal["none", "image", "text"] = "none"  # a further view beside image and text
        label_smoothing: float = 0.1  # share of the target spread evenly over all keys

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(0 <= self.label_smoothing < 1, "label_smoothing", "a share in [0, 1)", self.label_smoothing)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {} if options.third == "none" else {f"{options.third}_views": 1}

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        scale = beside(1 / t, image)
        if self.config.third == "none":
            terms = [mean_rows(self._two, *sides, shared=(scale,)) for sides in ((text, image), (image, text))]
        else:
            view = at_least_float32(getattr(embeddings, f"{self.config.third}_views")[0])
            terms = self._three(image, text, view, scale)
        loss = (terms[0] + terms[1]) / 2
        return Loss(loss, numbers(objective=loss, temperature=t))

    def _two(self, s: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        return self._rows(1 - s.square(), own, scale)

    def _three(self, image: Tensor, text: Tensor, view: Tensor, scale: Tensor) -> list[Tensor]:
        """Of text anchors, and of the pairs (image, view) as anchors."""
        inner = (image * view).sum(1)  # (b,) c
        views, texts, inners = gather(view), gather(text), gather(inner[:, None])[:, 0]

        def against_pairs(a: Tensor, own: Tensor, rows: Tensor, views: Tensor, inners: Tensor, scale: Tensor) -> Tensor:
            return self._rows(squared_volume(a, rows @ views.T, inners), own, scale)

        def against_texts(a: Tensor, own: Tensor, rows: Tensor, c: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
            return self._rows(squared_volume(a, rows @ texts.T, c[:, None]), own, scale)

        return [
            mean_rows(against_pairs, text, image, text, shared=(views, inners, scale)),
            mean_rows(against_texts, image, text, view, inner, shared=(texts, scale)),
        ]

    def _rows(self, squared: Tensor, own: Tensor, scale: Tensor) -> Tensor:
        found = _SoftVolumes.apply(squared, own, scale, self.config.label_smoothing)  # type: ignore[no-untyped-call]
        return cast(Tensor, found)


class _SoftVolumes(torch.autograd.Function):
    """(V^2 (c, B), columns of the positives (c,), 1 / t, label smoothing) -> L of each row (c,)."""

    @staticmethod
    def forward(ctx: Any, squared: Tensor, own: Tensor, scale: Tensor, smoothing: float) -> Tensor:
        volumes = squared.clamp(min=0).add_(LEAST).sqrt_()
        x = volumes * -scale
        there = x.logsumexp(1, keepdim=True)
        found = there[:, 0] - (1 - smoothing) * x.gather(1, own[:, None])[:, 0] - smoothing * x.mean(1)
        weights = x.sub_(there).exp_().sub_(smoothing / x.shape[1])
        weights.scatter_add_(1, own[:, None], weights.new_full((len(own), 1), smoothing - 1))
        of_scale = -torch.linalg.vecdot(weights, volumes)
        gradient = weights.div_(volumes).mul_(scale / -2).masked_fill_(squared < 0, 0.0)
        ctx.save_for_backward(gradient, of_scale, scale)
        return found

    @staticmethod
    @first_order_only
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradient, of_scale, scale = ctx.saved_tensors
        return upstream[:, None] * gradient, None, (upstream * of_scale).sum().reshape(scale.shape), None


def squared_volume(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The Gram determinant of three unit vectors from their inner products, of shapes that broadcast."""
    return (1 - a.square()) * (1 - c.square()) - (b - a * c).square()
