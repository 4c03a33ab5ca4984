"""TempGenerator: a small network that gives every sample its temperature.

Qiu et al., "To Cool or not to Cool? Temperature Network Meets Large Foundation Models via DRO", ICML 2024,
arXiv:2404.04575. `isogclr_net` trains it; one for images, one for texts.

With x (D,) a unit embedding (no gradient flows into it) and M prototypes:

    p = dropout(sigmoid(A x + a))                     A (D, D)
    q = P p                                           P (M, D), rows of unit length
    w = softmax(q / exp(kappa)),  c = sigmoid(q)
    t = t_min + (t_max - t_min) sigmoid(w1 . ((w - 1/M) * c) + w0)

The method begins with prototypes that are embeddings of the other modality: `start_from`.

Numerics: float32 at least, also where its weights and the embeddings are bf16: divided by exp(kappa) = 0.01, a rounding
of q by 2^-9 would choose among prototypes at random. t lies strictly between its bounds up to rounding.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from amclr_scale.errors import UserError
from amclr_scale.objectives.base import at_least_float32


class _Linear(nn.Linear):
    """In float32 at least; a module of its own, for ZeRO's stage 3 fetches its weights when it is called."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = at_least_float32(self.weight), at_least_float32(self.bias)
        return F.linear(x.to(weight.dtype), weight, bias)


class TempGenerator(nn.Module):
    """Temperatures from embeddings: (b, D) -> (b,)."""

    def __init__(
        self,
        width: int,
        *,
        num_prototypes: int = 256,
        temperature_min: float = 0.005,
        temperature_max: float = 0.05,
        dropout: float = 0.5,
    ) -> None:
        """Start from random prototypes; `set_prototypes` replaces them.

        Args:
            width: D.
            num_prototypes: M.
            temperature_min: lower bound, exclusive.
            temperature_max: upper bound, exclusive.
            dropout: probability, on p.

        Raises:
            UserError: (a ValueError) bounds out of order, or fewer than two prototypes.
        """
        super().__init__()
        if not 0 < temperature_min < temperature_max:
            raise UserError(
                f"temperature_min: expected 0 < temperature_min < temperature_max, got {temperature_min} and "
                f"{temperature_max}"
            )
        if num_prototypes < 2:
            raise UserError(f"num_prototypes: expected at least 2, got {num_prototypes}")
        self.temperature_min, self.temperature_max, self.dropout = temperature_min, temperature_max, dropout
        self.hidden = _Linear(width, width)
        self.prototypes = nn.Parameter(torch.randn(num_prototypes, width))
        self.kappa = nn.Parameter(torch.full((1,), math.log(0.01)))
        self.weight = nn.Parameter(torch.ones(num_prototypes))  # w1
        self.bias = nn.Parameter(torch.zeros(1))  # w0; shape (1,), which DeepSpeed can shard

    @torch.no_grad()
    def set_prototypes(self, features: Tensor) -> None:
        """Take the prototypes from data, before the first step: the method's start.

        Args:
            features: (at least M, D), embeddings of the OTHER modality before normalisation, the same on all ranks.

        Raises:
            UserError: (a ValueError) too few rows, or another width.
        """
        if features.ndim != 2 or len(features) < len(self.prototypes) or features.shape[1] != self.prototypes.shape[1]:
            raise UserError(
                f"features: expected at least {tuple(self.prototypes.shape)}, got {tuple(features.shape)}; "
                "gather more samples, or use fewer prototypes"
            )
        self.prototypes.copy_(features[: len(self.prototypes)])

    def forward(self, embeddings: Tensor) -> Tensor:
        """Give temperatures, (b,).

        Args:
            embeddings: (b, D), of unit length. They get no gradient.
        """
        where = "cpu" if embeddings.is_meta else embeddings.device.type
        with torch.autocast(where, enabled=False):
            own = (self.prototypes, self.kappa, self.weight, self.bias)
            prototypes, kappa, weight, bias = (at_least_float32(parameter) for parameter in own)
            p = F.dropout(self.hidden(embeddings.detach()).sigmoid(), self.dropout, self.training)
            q = p @ F.normalize(prototypes, dim=1).T  # (b, M)
            w = (q / kappa.exp()).softmax(1)
            score = ((w - 1 / q.shape[1]) * q.sigmoid()) @ weight + bias  # (b,)
            share = score.sigmoid()
            return self.temperature_min + (self.temperature_max - self.temperature_min) * share


class TempGenerators(nn.Module):
    """One generator for images and one for texts: parts of a model, as `Objective.model_parts` describes them."""

    learning_rate_factor: ClassVar[str] = "temperature"

    def __init__(self, image: TempGenerator, text: TempGenerator) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.start_samples = max(len(image.prototypes), len(text.prototypes))

    def forward(self, outputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """`image` and `text`, (b, D), as far as they are there -> `image_temperature` and `text_temperature`, (b,)."""
        sides = {"image": self.image, "text": self.text}
        return {f"{side}_temperature": of(outputs[side]) for side, of in sides.items() if side in outputs}

    @torch.no_grad()
    def start_from(self, image_features: Tensor, text_features: Tensor) -> None:
        """Take the prototypes of each modality from the other one's embeddings, before normalisation.

        Args:
            image_features: (at least M, D), the same on all ranks.
            text_features: likewise.
        """
        self.image.set_prototypes(text_features)
        self.text.set_prototypes(image_features)
