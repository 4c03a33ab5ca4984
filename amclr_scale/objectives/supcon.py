"""SupCon: several positives per anchor, all samples of its class, inside the logarithm or outside of it.

Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362.

With logits x_ip = s_ip / t, A_i the keys of anchor i, P_i those of them in its group, n_i = |P_i|:

    out   L_i = log sum_{j in A_i} exp(x_ij) - (1/n_i) sum_{p in P_i} x_ip
    in    L_i = log sum_{j in A_i} exp(x_ij) - log( (1/n_i) sum_{p in P_i} exp(x_ip) )                in <= out

    between modalities    anchors are images, keys all texts; and the other way round; value = (1/2) mean_i (L_i + L'_i)
    inside one            anchors are both views of every sample, keys the 2 B - 1 other views; value = their mean

`out` needs group sums of features only, (1/n_i) sum_p x_ip = a_i . (sum_p k_p) / (n_i t); `in` needs log-sums over the
keys of the own group, a second pass.

Numerics: log-sums and means are centred on the pair before the division by t, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from amclr_scale.declarations import read_by_positives
from amclr_scale.objectives.base import Objective, at_least_float32, learned_temperature, numbers
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.simclr import of_two_views
from amclr_scale.similarity import SameGroup, contrast
from amclr_scale.types import Embeddings, Loss

Positives = Literal["label", "image", "text"]


class SupCon(Objective, name="supcon"):
    """Softmax loss with several positives per anchor, those of its class."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `supcon`."""

        temperature: float | None = 0.07  # fixed; null: learned, 1 / logit_scale
        positives: Literal["label", "image", "text"] = "label"  # of one class; of one image; with one caption
        log: Literal["out", "in"] = "out"  # where the mean over positives stands
        between: Literal["modalities", "image", "text"] = "modalities"  # or the two views of one modality

        def __post_init__(self) -> None:
            check_temperature(self.temperature)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        views = {} if options.between == "modalities" else {f"{options.between}_views": 1}
        return {**read_by_positives(options), **views}

    @staticmethod
    def negatives_of(options: Any, B: int) -> int:
        return B - 1 if options.between == "modalities" else 2 * B - 2

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        same = positives_of(embeddings, config.positives)
        if config.between == "modalities":
            sides = self._between(at_least_float32(embeddings.image), at_least_float32(embeddings.text), t, same)
        else:
            first: Tensor = getattr(embeddings, config.between)
            second: Tensor = getattr(embeddings, f"{config.between}_views")[0]
            sides = self._inside(at_least_float32(first), at_least_float32(second), t, same)
        loss = (sides[0] + sides[1]).mean() / 2
        return Loss(loss, numbers(objective=loss, positives=same.counts.double().mean(), temperature=t))

    def _between(self, image: Tensor, text: Tensor, t: Tensor | float, same: SameGroup) -> list[Tensor]:
        both = contrast(image, text, temperature=t, centred=True)
        sides, n = (both.image, both.text), same.counts.to(both.image.log_sum.dtype)
        if self.config.log == "in":
            own = contrast(image, text, temperature=t, centred=True, group_keys="own", **_groups(same))
            among = (own.image.log_sum, own.text.log_sum)
            return [side.log_sum - x + n.log() for side, x in zip(sides, among, strict=True)]
        sums = ((image * same.sums(text)).sum(1), (text * same.sums(image)).sum(1))
        return [side.log_sum - (x / n - side.positive) / t for side, x in zip(sides, sums, strict=True)]

    def _inside(self, first: Tensor, second: Tensor, t: Tensor | float, same: SameGroup) -> list[Tensor]:
        log_sums = of_two_views(first, second, t, {})
        n = 2 * same.counts.to(log_sums[0].dtype) - 1
        if self.config.log == "in":
            among = of_two_views(first, second, t, {"group_keys": "own", **_groups(same)})
            return [x - y + n.log() for x, y in zip(log_sums, among, strict=True)]
        pair, total = (first * second).sum(1), same.sums(first) + same.sums(second)
        means = [(z * (total - z)).sum(1) / n for z in (first, second)]
        return [x - (mean - pair) / t for x, mean in zip(log_sums, means, strict=True)]


def positives_of(embeddings: Embeddings, positives: Positives) -> SameGroup:
    """The samples that share a label, an image or a caption; a negative label is shared with nobody."""
    found: Tensor = getattr(embeddings, {"label": "labels", "image": "ids", "text": "text_content"}[positives])
    return SameGroup(found.to(embeddings.image.device))


def _groups(same: SameGroup) -> dict[str, Any]:
    return {"image_groups": same.numbers, "text_groups": same.numbers}
