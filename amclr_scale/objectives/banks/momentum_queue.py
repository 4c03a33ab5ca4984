"""Contrast with a moving average of the towers: its features as keys, kept in queues, and its opinions as soft targets.

ALBEF's image-text contrastive loss: Li et al., "Align before Fuse", NeurIPS 2021, arXiv:2107.07651. Without soft
targets it is He et al., "Momentum Contrast", CVPR 2020, arXiv:1911.05722, of two modalities; with `queue_only` no other
sample of the batch is a key, as there.

With keys k_j of image anchors z_i, teacher's features z^m_i, t^m_i, and logits x_ij = z_i . k_j / t:

    keys      in the batch, of all ranks: t^m_j (momentum), t_j (student), or both; then the rows of the text queue that
              are not of sample i
    targets   y_ij = alpha softmax_j(z^m_i . k_j / t) + (1 - alpha) [k_j is of pair i] / (positives of i: 1, or 2)
    value     (1/2) mean_i (- sum_j y_ij log softmax_j(x_ij)) + text anchors' likewise

Targets have no gradient; keys have one where they are the student's. alpha grows from 0 over the first
`alpha_ramp_samples` samples. After the loss the teacher's features of the batch go into the queues (bank.py).

Nothing of size b x B is kept: sum_j y_ij x_ij needs of the softmax only the mean key c_i = sum_j p_ij k_j, which is
t times the gradient of the teacher's own log-sum with respect to z^m_i. Numerics: as in CLIP.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from amclr_scale.objectives.banks.count import Count
from amclr_scale.objectives.banks.queues import BankOptions, KeepsQueues, Look, ids_of
from amclr_scale.objectives.base import (
    Layout,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.layers import LayerOptions
from amclr_scale.similarity import ExtraKeys, all_gather, contrast, map_rows
from amclr_scale.types import Embeddings, Loss

Pair = tuple[Tensor, Tensor]  # of images and of texts


class MomentumQueue(KeepsQueues, name="momentum_queue"):
    """ALBEF's contrastive loss with a momentum encoder, queues and soft targets; MoCo at alpha = 0."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"size": 0, "queue_only": False}

    @dataclass(frozen=True, kw_only=True)
    class Config(BankOptions, LayerOptions):
        """Options of `momentum_queue`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        alpha: float = 0.4  # share of the target that is the teacher's softmax
        alpha_ramp_samples: int = 0  # samples over which alpha grows from 0; ALBEF: those of the first epoch
        in_batch_keys: Literal["momentum", "student", "both"] = "momentum"  # whose features of the batch are keys
        queue_only: bool = False  # negatives from the queues alone, as in MoCo

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(0 <= self.alpha <= 1, "alpha", "a share in [0, 1]", self.alpha)
            ramp = self.alpha_ramp_samples
            require(ramp >= 0, "alpha_ramp_samples", "a number of samples, 0 or more", ramp)
            fits = not self.queue_only or self.in_batch_keys == "momentum"
            require(fits, "in_batch_keys", "momentum, since queue_only is true", self.in_batch_keys)
            fits = not (self.queue_only and self.wait_epochs)
            require(fits, "wait_epochs", "0, since queue_only leaves no other negatives", self.wait_epochs)
            super().__post_init__()

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {"ids": True, "image_momentum": True, "text_momentum": True}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        in_batch = 0 if options.queue_only else (B - 1) * (2 if options.in_batch_keys == "both" else 1)
        return in_batch + int(options.size)

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config, sample_state)
        self.samples = Count()

    @property
    def alpha(self) -> float:
        """Share of the teacher in the targets of the next step."""
        ramp = self.config.alpha_ramp_samples
        return self.config.alpha * (min(1.0, self.samples.value / ramp) if ramp else 1.0)

    def rehearse(self, width: int, slots: int) -> None:
        super().rehearse(width, slots)
        self.samples.value = self.config.alpha_ramp_samples

    def forward(self, embeddings: Embeddings) -> Loss:
        t, ids, alpha = learned_temperature(embeddings, self.config.temperature), ids_of(embeddings), self.alpha
        student = (embeddings.image, embeddings.text)
        teacher = (at_least_float32(embeddings.image_momentum), at_least_float32(embeddings.text_momentum))
        teacher = (teacher[0].detach(), teacher[1].detach())
        look = self.bank.look(*teacher, ids, self.epoch)
        losses, positives = self._hard(student, teacher, look, t)
        if alpha:
            means = self._teacher_means(student, teacher, look, t)
            soft = zip(losses, positives, means, strict=True)
            losses = tuple(loss + alpha * (positive - mean) for loss, positive, mean in soft)
        loss = (losses[0] + losses[1]).mean() / 2
        if self.learns:
            self.bank.put(*teacher, ids)
            self.samples.add(global_batch_size(ids))
        cosine = sum(F.cosine_similarity(x.detach(), y, dim=1).mean() for x, y in zip(student, teacher, strict=True))
        return Loss(
            loss, numbers(objective=loss, temperature=t, alpha=alpha, teacher_cosine=cosine / 2, **look.metrics)
        )

    def _hard(self, student: Pair, teacher: Pair, look: Look, t: Tensor | float) -> tuple[tuple[Tensor, ...], Pair]:
        """Log-sums less the mean logit of the positives, and this mean, of image and text anchors, (b,) each."""
        (z, y), (zm, ym) = student, teacher
        images, texts = look.extra_images, look.extra_texts
        many = not self.config.queue_only

        def against(a: Tensor, b: Tensor, images: ExtraKeys | None, texts: ExtraKeys | None) -> Any:
            return contrast(
                a, b, temperature=t, centred=True, extra_image_keys=images, extra_text_keys=texts, batch_negatives=many
            )

        if self.config.in_batch_keys == "student":
            both = against(z, y, images, texts)
            found = both.image, both.text
        elif self.config.in_batch_keys == "momentum":
            found = against(z, ym, None, texts).image, against(zm, y, images, None).text
        else:
            both = against(z, y, images, texts)
            twos = (both.image, against(z, ym, None, None).image), (both.text, against(zm, y, None, None).text)
            losses, positives = [], []
            for one, other in twos:
                apart = (one.positive - other.positive) / t / 2
                losses.append(torch.logaddexp(one.log_sum + apart, other.log_sum - apart))
                positives.append((one.positive + other.positive) / t / 2)
            return tuple(losses), (positives[0], positives[1])
        return tuple(side.log_sum for side in found), (found[0].positive / t, found[1].positive / t)

    def _teacher_means(self, student: Pair, teacher: Pair, look: Look, t: Tensor | float) -> Pair:
        """The teacher's mean of the logits, sum_j p_ij x_ij, of image and text anchors, (b,) each."""
        fixed = t.detach() if isinstance(t, Tensor) else t
        (z, y), (zm, ym) = student, teacher
        of_image = self._teacher_mean(z, zm, y, ym, look.extra_texts, fixed)
        of_text = self._teacher_mean(y, ym, z, zm, look.extra_images, fixed)
        return of_image / t, of_text / t

    def _teacher_mean(
        self, anchors: Tensor, guides: Tensor, keys: Tensor, teacher_keys: Tensor, extra: ExtraKeys | None,
        t: Tensor | float,
    ) -> Tensor:  # fmt: skip
        """sum_j p_ij s_ij, (b,): p of the guides, the teacher's anchors, and s of the student's."""
        kind = self.config.in_batch_keys
        with torch.enable_grad():
            leaf = guides.clone().requires_grad_()
            of_batch = {"momentum": (teacher_keys,), "student": (keys,), "both": (keys, teacher_keys)}[kind]
            sums = [
                contrast(
                    leaf, rows.detach().to(leaf.dtype), temperature=t, extra_text_keys=extra if n == 0 else None,
                    batch_negatives=not self.config.queue_only,
                ).image.log_sum
                for n, rows in enumerate(of_batch)
            ]  # fmt: skip
            log_sum = sums[0] if len(sums) == 1 else torch.logaddexp(*sums)
            (mean_key,) = torch.autograd.grad(log_sum.sum(), leaf)
        found = (at_least_float32(anchors) * (mean_key * t)).sum(1)
        if kind == "momentum":
            return found
        columns = all_gather(keys.detach()).to(leaf.dtype)

        def rows(block: Tensor, _: Tensor, guide: Tensor, whole: Tensor) -> tuple[Tensor]:
            weights = ((guide @ columns.T) / t - whole[:, None]).exp().detach()
            return ((weights * block).sum(1),)

        # the mean key is a constant for the anchors; for the student's keys in it there is this gradient
        (again,) = map_rows(rows, anchors.detach(), keys, guides, log_sum.detach())
        return found + again - again.detach()
