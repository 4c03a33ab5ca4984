"""SigLIP: every pair of the B x B is a yes-or-no question of its own.

Zhai et al., "Sigmoid Loss for Language Image Pre-Training", ICCV 2023, arXiv:2303.15343.

With y_ij = 1 if i = j else -1, over the texts j of all ranks:

    value = mean_i sum_j log(1 + exp(-y_ij (scale s_ij + bias)))

Scale and bias are learned by the model (published start: scale 10, bias -10).

Numerics: log-sigmoid in float32; no row statistic is needed, so a block of pairs is visited independently of others.
"""

from dataclasses import dataclass

from torch import Tensor

from amclr_scale.errors import UserError
from amclr_scale.objectives.base import Objective, at_least_float32, numbers
from amclr_scale.similarity import pairwise
from amclr_scale.types import Embeddings, Loss


class SigLIP(Objective, name="siglip"):
    """Sigmoid loss over all pairs, with learned scale and bias."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `siglip`: none. Its scale and bias are the model's."""

    config: Config

    def forward(self, embeddings: Embeddings) -> Loss:
        scale, bias = scale_and_bias(embeddings, self.name)
        loss = pairwise(embeddings.image, embeddings.text, scale, bias)
        return Loss(loss, numbers(objective=loss, temperature=1 / scale, logit_bias=bias))


def scale_and_bias(embeddings: Embeddings, name: str) -> tuple[Tensor, Tensor]:
    """The model's learned ones, (1,) each.

    Raises:
        UserError: it has none.
    """
    found: list[Tensor] = []
    for field in ("logit_scale", "logit_bias"):
        value = getattr(embeddings, field)
        if value is None:
            raise UserError(f"embeddings.{field}: {name} needs the model's learned one, got None")
        found.append(at_least_float32(value))
    return found[0], found[1]
