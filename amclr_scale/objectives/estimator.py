"""What SogCLR and its relatives share: centred statistics of a batch, and moving averages kept as logarithms.

For anchor i, negatives j != i, h_ij = s_ij - s_ii, temperature t_i:

    x_ij = h_ij / t_i                      or f(h_ij) / t_i with the squared hinge f(h) = max(0, h + margin)^2
    g_i  = mean_j exp(x_ij)                what this batch says
    u_i <- (1 - gamma) u_i + gamma g_i     what all batches said; u_i = g_i at first sight
    w_i  = g_i / u_i                       differentiated in g_i only; the estimator's gradient is that of t_i w_i

Numerics: g and u are held as logarithms, so exp(log g - log u) <= 1 / gamma and nothing overflows or starves,
however small the temperature and however wide the gap between positives and negatives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Layout, Objective, at_least_float32, global_batch_size, require
from amclr_scale.objectives.masking import NO_MASK, Masking, MaskOptions
from amclr_scale.objectives.sample_state import SampleState, Visit
from amclr_scale.similarity import contrast, map_rows
from amclr_scale.types import Embeddings

Temperature = float | Tensor


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions(MaskOptions):
    """Options of every objective that keeps u for each sample."""

    num_samples: int  # images in the data set
    num_texts: int | None = None  # texts in the data set, where that is another number
    gamma: float = 0.8  # weight of the newest batch in u
    gamma_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from 1 in epoch 0 to gamma
    gamma_epochs: float | None = None  # epochs the cosine takes

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "gamma", "a weight in (0, 1]", self.gamma)
        require(
            self.gamma_schedule == "constant" or (self.gamma_epochs is not None and self.gamma_epochs > 0),
            "gamma_epochs",
            f"a positive number of epochs for the {self.gamma_schedule} schedule",
            self.gamma_epochs,
        )
        super().__post_init__()

    def gamma_at(self, epoch: float) -> float:
        """The weight of the newest batch in u."""
        if self.gamma_schedule == "constant":
            return self.gamma
        assert self.gamma_epochs is not None, "__post_init__ refuses this"
        return cosine_from_one(epoch, self.gamma, self.gamma_epochs)


class KeepsEstimates(Objective):
    """An objective with a table of images and one of texts."""

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "ids": True}


@dataclass(frozen=True)
class Centred:
    """One direction's statistics over the negatives of each local anchor."""

    log_g: Tensor  # (b,) log of the mean over negatives of exp(x); differentiable in embeddings and temperature
    expected: Tensor  # (b,) mean of x under weights proportional to exp(x); no gradient


def centred(
    image: Tensor,
    text: Tensor,
    temperature: Temperature | tuple[Temperature, Temperature],
    masking: Masking = NO_MASK,
    *,
    margin: float | None = None,
) -> tuple[Centred, Centred]:
    """Statistics of (image anchors, text anchors).

    Args:
        image: (b, D).
        text: (b, D).
        temperature: one for both sides, or (image side, text side); each a number or (b,).
        masking: what is left out of the mean; not with a hinge.
        margin: the squared hinge's; None: no hinge.
    """
    if margin is None:
        both = contrast(image, text, temperature=temperature, exclude_positive=True, centred=True, **masking.of())
        of_image, of_text = (Centred(x.log_sum - x.log_num_keys, x.expected) for x in (both.image, both.text))
        return of_image, of_text
    assert masking == NO_MASK, "the options refuse this"
    image_t, text_t = temperature if isinstance(temperature, tuple) else (temperature, temperature)
    return _hinged(image, text, image_t, margin), _hinged(text, image, text_t, margin)


def _hinged(anchors: Tensor, keys: Tensor, temperature: Temperature, margin: float) -> Centred:
    require(global_batch_size(anchors) > 1, "batch", "at least 2 samples, for a negative to exist", 1)

    def rows(block: Tensor, positive: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        column = positive[:, None]  # (c, 1)
        h = block - block.gather(1, column)  # (c, B)
        x = (h + margin).clamp(min=0).square() / t[:, None].to(h.dtype)
        x = x.scatter(1, column, -torch.inf)
        log_g = x.logsumexp(1) - math.log(x.shape[1] - 1)
        weights = x.detach().softmax(1)
        expected = (weights * x.detach().scatter(1, column, 0.0)).sum(1)
        return log_g, expected

    dtype = at_least_float32(anchors).dtype  # 8 bits of 1/t would be wrong by several percent in exp(x)
    per_row = torch.as_tensor(temperature, dtype=dtype, device=anchors.device).expand(len(anchors))
    return Centred(*map_rows(rows, anchors, keys, per_row))


def log_moving_average(old: Tensor, new: Tensor, gamma: float) -> Tensor:
    """log((1 - gamma) exp(old) + gamma exp(new)); `new` where old is -inf, the value before the first visit.

    Where new is -inf, of an anchor without keys, old stays.
    """
    old = old.to(new.dtype)
    new = torch.where(new.isneginf(), old, new)
    if gamma == 1.0:
        return new
    blended = torch.logaddexp(old + math.log1p(-gamma), new + math.log(gamma))
    return torch.where(old.isneginf(), new, blended)


def ratio(log_g: Tensor, log_u: Tensor) -> Tensor:
    """The term g / u, differentiable in g; 0 of an anchor without keys, also where its u is not known."""
    return torch.where(log_g.isneginf(), log_g, log_g - log_u).exp()


def cosine_from_one(epoch: float, last: float, num_epochs: float) -> float:
    """1 in epoch 0, down half a cosine to `last` after `num_epochs`; one value per epoch, as published."""
    progress = min(math.floor(epoch) / num_epochs, 1.0)
    return last + (1 - last) * (1 + math.cos(math.pi * progress)) / 2


def two_states(
    num_samples: int, num_texts: int | None, columns: dict[str, float], layout: Layout, *, width: int = 0
) -> tuple[SampleState, SampleState]:
    """The tables of images and of texts."""
    image = SampleState(num_samples, columns, width=width, layout=layout)
    num_texts = num_samples if num_texts is None else num_texts
    return image, SampleState(num_texts, columns, width=width, layout=layout, of_texts=True)


def two_visits(embeddings: Embeddings, image: SampleState, text: SampleState) -> tuple[Visit, Visit]:
    """The step's rows of both tables; texts go by `text_ids` where an image has several captions."""
    assert embeddings.ids is not None, "Objective.__call__ refuses this"
    require(
        embeddings.text_ids is not None or image.num_samples == text.num_samples,
        "embeddings.text_ids",
        f"ids of the texts, of which there are {text.num_samples} for {image.num_samples} images",
        None,
        fix="give them, or leave num_texts out",
    )
    text_ids = embeddings.ids if embeddings.text_ids is None else embeddings.text_ids
    device, dtype = embeddings.image.device, embeddings.image.dtype
    return image.visit(embeddings.ids.to(device), dtype), text.visit(text_ids.to(device), dtype)
