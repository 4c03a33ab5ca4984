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
1e-6 under the root bounds its slope; similarities in float32, one block for both directions.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, beside, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.similarity import softmaxes
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
        e = self.config.label_smoothing
        if self.config.third == "none":
            sides = softmaxes(_of_two, (text,), (image,), shared=(scale,), mean=e > 0)
        else:
            view = at_least_float32(getattr(embeddings, f"{self.config.third}_views")[0])
            inner = (image * view).sum(1)  # (b,) c
            sides = softmaxes(_of_three, (text, text), (image, view), per_column=(inner,), shared=(scale,), mean=e > 0)
        terms = [side.log_sum - (1 - e) * side.positive - (e * side.mean if e else 0) for side in sides]
        loss = (terms[0] + terms[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, temperature=t))


def _of_two(s: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _logits(1 - s.square(), scale)


def _of_three(a: Tensor, b: Tensor, c: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return _logits(squared_volume(a, b, c), scale)


def _logits(squared: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """From V^2 (c, B) and 1 / t to x, which is what the softmax and the means are of."""
    x = (squared.clamp(min=0) + LEAST).sqrt() * -scale
    return x, x


def squared_volume(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The Gram determinant of three unit vectors from their inner products, of shapes that broadcast."""
    return (1 - a.square()) * (1 - c.square()) - (b - a * c).square()
