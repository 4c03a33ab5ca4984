"""PamC: the mean of each cluster of keys stands for all of them in the denominator.

Kulatilleke, Portmann and Chandra, "Efficient Block Contrastive Learning via Parameter-Free Meta-Node Approximation",
2022, arXiv:2209.14067, for nodes of a graph; here between two modalities, with clusters that follow training
(clusters.py) in place of those of all nodes at once.

With mu_c the mean of the text cluster c, not made unit length, and p_c its share of the texts, both moving averages:

    L_i   = log( B sum_c p_c exp(z_i.mu_c / t) ) - s_ii / t
    value = (1/2) mean_i (L_i + L'_i)                                                  L' has clusters of images

As exp is convex, sum_c p_c exp(z_i.mu_c / t) is at most what the keys themselves give, which is what SogCLR's u
averages: so this is the control for an average per sample, one per cluster, of features in place of exponentials.
The gradient of a mean goes into its members in the newest batch, which stand for all of them (clusters.py). With one
key per cluster and gamma = 1 it is CLIP.

Numerics: log-sums centred on the positive, in float32; b x C similarities are kept.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import Equal
from amclr_scale.objectives.base import (
    Objective,
    at_least_float32,
    global_batch_size,
    learned_temperature,
    numbers,
    require,
)
from amclr_scale.objectives.clip import check_temperature, softmax_loss
from amclr_scale.objectives.clusters import Clustering, Clusters
from amclr_scale.similarity import contrast
from amclr_scale.types import Embeddings, Loss


class PamC(Objective, name="pamc"):
    """Softmax loss whose negatives are the means of clusters: the control for averages per sample."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"estimate": "batch"}

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `pamc`."""

        temperature: float | None = None  # fixed; null: learned, 1 / logit_scale
        clusters: int = 256  # C, of each modality
        gamma: float = 0.8  # weight of the newest batch in the means and shares
        idle_steps: int = 100  # after so many steps without a member a cluster begins anew
        estimate: Literal["means", "batch"] = "means"  # batch: the keys themselves, which is clip, the control

        def __post_init__(self) -> None:
            check_temperature(self.temperature)
            require(self.clusters > 0, "clusters", "at least 1", self.clusters)
            require(0 < self.gamma <= 1, "gamma", "a weight in (0, 1]", self.gamma)
            require(self.idle_steps >= 0, "idle_steps", "a number of steps, 0 or more", self.idle_steps)

    config: Config

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 if options.estimate == "batch" else int(options.clusters)

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        if options.estimate != "batch":
            return None
        return Equal("clip", {"temperature": options.temperature}, "the keys themselves are the batch's")

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.clusters = Clusters(dict.fromkeys(("image", "text"), config.clusters), config.gamma, config.idle_steps)

    def allocate(self, width: int) -> None:
        super().allocate(width)
        if self.predicts:
            self.clusters.make(width)

    def rehearse(self, width: int, slots: int) -> None:
        super().rehearse(width, slots)
        if self.predicts:
            self.clusters.make(width)
            self.clusters.fill()

    def forward(self, embeddings: Embeddings) -> Loss:
        image, text = at_least_float32(embeddings.image), at_least_float32(embeddings.text)
        t = learned_temperature(embeddings, self.config.temperature)
        if not self.predicts:
            loss = softmax_loss(contrast(image, text, temperature=t, centred=True))
            return Loss(loss, numbers(objective=loss, temperature=t))
        positive = (image * text).sum(1)
        found = {side: self.clusters.join(side, keys)[1] for side, keys in (("image", image), ("text", text))}
        if self.learns:
            self.clusters.store(found)
        sides = ((image, found["text"]), (text, found["image"]))
        terms = [log_mean(anchors, positive, t, clusters) for anchors, clusters in sides]
        loss = (terms[0] + terms[1]).mean() / 2 + math.log(global_batch_size(image))
        number = (found["image"].number + found["text"].number) / 2
        return Loss(loss, numbers(objective=loss, clusters=number, temperature=t))

    @property
    def predicts(self) -> bool:
        """Whether denominators come from clusters."""
        return self.config.estimate != "batch"

    @torch.no_grad()
    def log_means(self, embeddings: Embeddings, trained_with: int) -> tuple[Tensor, Tensor]:
        """Its estimates (b,) of the logarithm of the mean of exp((s_ij - s_ii) / t) over all keys j, i among them.

        With `estimate: batch` they are those of the keys of this batch; -inf before the first step.
        """
        t = learned_temperature(embeddings, self.config.temperature)
        t = t.squeeze() if isinstance(t, Tensor) else t
        image, text = (at_least_float32(x.detach()) for x in (embeddings.image, embeddings.text))
        if not self.predicts:
            both, log_B = contrast(image, text, temperature=t, centred=True), math.log(global_batch_size(image))
            return both.image.log_sum - log_B, both.text.log_sum - log_B
        if not self.clusters.width:
            return image.new_full((len(image),), -math.inf), text.new_full((len(text),), -math.inf)
        positive = (image * text).sum(1)
        of_image = log_mean(image, positive, t, self.clusters.of("text", image))
        return of_image, log_mean(text, positive, t, self.clusters.of("image", text))


def log_mean(anchors: Tensor, positive: Tensor, t: Tensor | float, clusters: Clustering) -> Tensor:
    """(b,): log sum_c p_c exp((z_i.mu_c - s_ii) / t), shares of 1 in all."""
    with torch.autocast(anchors.device.type, enabled=False):
        return ((anchors @ clusters.means.T - positive[:, None]) / t + clusters.log_shares).logsumexp(1)
