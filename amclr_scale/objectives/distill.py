"""Distillation: a teacher's softmax over the batch is part of the target.

Li et al., "Align before Fuse", NeurIPS 2021, arXiv:2107.07651 (ALBEF), without its queue; with a frozen teacher it is
the term that Wei et al., "Model Steering", 2025, arXiv:2505.06699, have beside DRRho-CLIP.

With r, o a teacher's features of images and texts, t' its temperature, and alpha the share of its targets:

    q_ij  = softmax_j( r_i.o_j / t' )                                                    over the keys of all ranks
    L_i   = log sum_j exp(s_ij / t) - (1 - alpha) s_ii / t - alpha sum_j q_ij s_ij / t
    value = (1/2) mean_i (L_i + L'_i)                                                    L' has texts for anchors

The teacher is a moving average of the towers (model.momentum) or a frozen model (data.image_reference and
data.text_reference). Targets have no gradient. alpha grows from 0 over the first `alpha_ramp_epochs` epochs.

Numerics: log-sums centred on the positive; the teacher's softmaxes over rows and over columns from one block, given its
log-sums, centred as well; float32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.similarity import all_gather, contrast, mean_rows, using
from amclr_scale.types import Embeddings, Loss


class Distill(Objective, name="distill"):
    """CLIP with a teacher's softmax as part of the target."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `distill`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        teacher: Literal["momentum", "reference"] = "momentum"  # whose softmax it is
        teacher_temperature: float | None = None  # of that softmax; null: the same as the loss has
        alpha: float = 0.4  # share of the target that is the teacher's
        alpha_ramp_epochs: float = 0.0  # epochs over which alpha grows from 0

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            t = self.teacher_temperature
            require(t is None or t > 0, "teacher_temperature", "a positive number, or null for the loss's", t)
            require(0 <= self.alpha <= 1, "alpha", "a share in [0, 1]", self.alpha)
            ramp = self.alpha_ramp_epochs
            require(ramp >= 0, "alpha_ramp_epochs", "a number of epochs, 0 or more", ramp)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {f"{side}_{options.teacher}": True for side in ("image", "text")}

    def forward(self, embeddings: Embeddings) -> Loss:
        config, ramp = self.config, self.config.alpha_ramp_epochs
        alpha = config.alpha * (min(1.0, self.epoch / ramp) if ramp else 1.0)
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, config.temperature)
        t_teacher = config.teacher_temperature or (t.detach() if isinstance(t, Tensor) else t)
        r, o = (
            F.normalize(at_least_float32(getattr(embeddings, f"{side}_{config.teacher}").detach()), dim=1)
            for side in ("image", "text")
        )
        both = contrast(image, text, temperature=t, centred=True)
        weights, of_teacher = softmaxes_of(r, o, t_teacher)
        missed = softly(image, text, weights, *of_teacher)
        loss = softmax_loss(both) - alpha * (missed / t).mean() / 2
        return Loss(loss, numbers(objective=loss, alpha=alpha, temperature=t))


Weights = Callable[..., Tensor]


@torch.no_grad()
def softmaxes_of(anchors: Tensor, keys: Tensor, t: Tensor | float) -> tuple[Weights, tuple[Tensor, Tensor, Tensor]]:
    """What makes q_ij + q'_ij - 2 [i = j] of rows of anchors, from softmaxes of anchors.keys / t over rows and columns.

    Where a positive's share is nearly all, what it lacks is the loss: it comes from the log-sum without a difference.

    Returns:
        f(columns of the positives (c,), *what it reads of these rows) -> (c, B), over all ranks' keys; and what it
        reads, of all rows of this rank: the anchors (b, D), their similarities to their positives, their log-sums (b,).
    """
    with using(precision="fp32"):  # as the blocks below, so that shares add up to 1
        both = contrast(anchors, keys, temperature=t, centred=True)
    positive = both.image.positive
    everybody, positives, of_columns = (all_gather(x) for x in (keys, positive, both.text.log_sum))

    @torch.no_grad()
    def weights(own: Tensor, rows: Tensor, positive: Tensor, log_sums: Tensor) -> Tensor:
        s = rows @ everybody.T
        found = (s - positive[:, None]).div_(t).sub_(log_sums[:, None]).exp_()
        found.add_(s.sub_(positives).div_(t).sub_(of_columns).exp_())
        return found.scatter_(1, own[:, None], ((-log_sums).expm1() + (-of_columns[own]).expm1())[:, None])

    return weights, (anchors, positive, both.image.log_sum)


def softly(anchors: Tensor, keys: Tensor, weights: Weights, *per_row: Tensor) -> Tensor:
    """The mean over rows of sum_j (q_ij + q'_ij) s_ij - 2 s_ii, over all ranks' keys.

    Its mean over ranks is that of sum_j q_ij s_ij - s_ii over all anchors and the same over all keys, from one pass.
    """
    return mean_rows(lambda s, own, *mine: (weights(own, *mine) * s).sum(1), anchors, keys, *per_row)
