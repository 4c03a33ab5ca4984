"""What SogCLR and its relatives share: centred statistics of a batch, and moving averages kept as logarithms.

For anchor i, negatives j != i, h_ij = s_ij - s_ii, temperature t_i:

    x_ij = h_ij / t_i                      or f(h_ij) / t_i with the squared hinge f(h) = max(0, h + margin)^2
    g_i  = mean_j exp(x_ij)                what this batch says
    u_i <- (1 - gamma) u_i + gamma g_i     what all batches said; u_i = g_i at first sight
    w_i  = g_i / u_i                       differentiated in g_i only; the estimator's gradient is that of t_i w_i

gamma is one of four, `gamma_schedule`:

    constant   gamma
    cosine     from 1 in epoch 0 to gamma after gamma_epochs, by whole epochs (FastCLIP)
    visits     max(gamma, 1 / k) at a sample's k-th visit: the plain mean of its g as long as that is above gamma
    scent      sigmoid(log_alpha + log u_i): the larger the estimate, the faster it moves (scent.py); gamma is not read

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
from amclr_scale.objectives.base import Layout, Objective, at_least_float32, global_batch_size, refuse_unread, require
from amclr_scale.objectives.masking import NO_MASK, Masking, MaskOptions
from amclr_scale.objectives.sample_state import SampleState, Visit
from amclr_scale.similarity import contrast, map_rows
from amclr_scale.types import Embeddings

Temperature = float | Tensor


@dataclass(frozen=True, kw_only=True)
class TableOptions(MaskOptions):
    """Options of every objective that keeps something for each sample."""

    num_samples: int  # images in the data set
    num_texts: int | None = None  # texts in the data set, where that is another number


@dataclass(frozen=True, kw_only=True)
class EstimatorOptions(TableOptions):
    """Options of every objective that keeps u for each sample, as a moving average."""

    gamma: float = 0.8  # weight of the newest batch in u
    gamma_schedule: Literal["constant", "cosine", "visits", "scent"] = "constant"  # see above
    gamma_epochs: float | None = None  # epochs the cosine takes
    log_alpha: float = 10.0  # scent: logarithm of the dual step alpha

    def __post_init__(self) -> None:
        require(0 < self.gamma <= 1, "gamma", "a weight in (0, 1]", self.gamma)
        require(
            self.gamma_schedule != "cosine" or (self.gamma_epochs is not None and self.gamma_epochs > 0),
            "gamma_epochs",
            f"a positive number of epochs for the {self.gamma_schedule} schedule",
            self.gamma_epochs,
        )
        check_log_alpha(self.log_alpha)
        for schedule, key in (("cosine", "gamma_epochs"), ("scent", "log_alpha")):
            refuse_unread(self, () if self.gamma_schedule == schedule else (key,), f"gamma_schedule {schedule}")
        super().__post_init__()

    def columns(self) -> dict[str, float]:
        """What a table holds for u: column -> initial value."""
        return {"log_u": -math.inf, **({"visits": 0.0} if self.gamma_schedule == "visits" else {})}

    def average(self, old: Mapping[str, Tensor], epoch: float) -> "Average":
        """How this step's g goes into u.

        Args:
            old: the samples' rows, with the columns above; (b,) or (b, width) each.
            epoch: samples seen / N.
        """
        if self.gamma_schedule == "scent":
            return Average(adaptive_gamma(old["log_u"], self.log_alpha), self.log_alpha)
        if self.gamma_schedule == "visits":
            return Average((1 / (old["visits"] + 1)).clamp(min=self.gamma))
        return Average(self.gamma_at(epoch))

    def gamma_at(self, epoch: float) -> float:
        """The weight of the newest batch in u, where the schedule goes by epochs."""
        if self.gamma_schedule == "constant":
            return self.gamma
        assert self.gamma_epochs is not None, "__post_init__ refuses this"
        return cosine_from_one(epoch, self.gamma, self.gamma_epochs)

    def counted(self, old: Mapping[str, Tensor], log_g: Tensor) -> dict[str, Tensor]:
        """The next visits, where they are counted; anchors without keys have not been visited.

        Args:
            old: see `average`.
            log_g: (b,), or (b, K) where old has (b, K) or (b, 1).
        """
        if self.gamma_schedule != "visits":
            return {}
        visits, seen = old["visits"], ~log_g.isneginf()
        return {"visits": visits + (seen if seen.shape == visits.shape else seen.any(1, keepdim=True))}


@dataclass(frozen=True)
class Average:
    """A rule that makes the next log u of the old one and of log g."""

    gamma: float | Tensor  # weight of the newest batch, one for all or one per number in the table
    log_alpha: float | None = None  # where gamma is SCENT's

    def __call__(self, old: Tensor, new: Tensor) -> Tensor:
        """The next log u; see `log_moving_average`, which says what -inf means."""
        if self.log_alpha is None:
            return log_moving_average(old, new, self.gamma)
        return dual_step(old, new, self.log_alpha)

    @property
    def mean_gamma(self) -> float | Tensor:
        """For metrics."""
        return self.gamma.mean() if isinstance(self.gamma, Tensor) else self.gamma


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


def log_moving_average(old: Tensor, new: Tensor, gamma: float | Tensor) -> Tensor:
    """log((1 - gamma) exp(old) + gamma exp(new)); `new` where old is -inf, the value before the first visit.

    Where new is -inf, of an anchor without keys, old stays.
    """
    old = old.to(new.dtype)
    new = torch.where(new.isneginf(), old, new)
    if isinstance(gamma, Tensor):
        weight = gamma.to(new.dtype)
        blended = torch.logaddexp(old + torch.log1p(-weight), new + weight.log())
    elif gamma == 1.0:
        return new
    else:
        blended = torch.logaddexp(old + math.log1p(-gamma), new + math.log(gamma))
    return torch.where(old.isneginf(), new, blended)


def dual_step(old: Tensor, new: Tensor, log_alpha: float) -> Tensor:
    """The logarithm of exp(old) (1 + alpha exp(new)) / (1 + alpha exp(old)), between old and new; -inf as above.

    `log_moving_average` with gamma = sigmoid(log_alpha + old), which neither overflows nor forms an exponential.
    """
    old = old.to(new.dtype)
    new = torch.where(new.isneginf(), old, new)
    zero = torch.zeros_like(new)
    moved = old + (torch.logaddexp(log_alpha + new, zero) - torch.logaddexp(log_alpha + old, zero))
    return torch.where(old.isneginf(), new, moved)


def adaptive_gamma(old: Tensor, log_alpha: float) -> Tensor:
    """The weight of the newest batch in `dual_step`; 1 at first sight."""
    return torch.where(old.isneginf(), 1.0, (log_alpha + old).sigmoid())


def check_log_alpha(log_alpha: float) -> None:
    """Raise unless it is a logarithm."""
    require(math.isfinite(log_alpha), "log_alpha", "the logarithm of a positive number, such as 10", log_alpha)


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
