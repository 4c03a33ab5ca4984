"""AmCLR and xAmCLR: SogCLR over all pairings of augmented views of a sample.

"AmCLR: Unified Augmented Learning for Cross-Modal Representations", 2024, arXiv:2412.07979.

Each entry k of the lists in pairings.py (4 image and 4 text entries for one further view each; xAmCLR adds 2 + 2
inside the modalities) contributes a SogCLR term at the fixed temperature t:

    value = sum_k weight_k mean_i t g_ik / u_ik  (+ the text list's)         reduce = "mean" divides by sum_k weight_k

The state u is a matter of choice, `state`:

    per_pair            u_ik of its own for every entry: each estimates what it is divided into
    shared_sequential   one u_i, updated by one entry after another within the step, each dividing by its own update:
                        as published
    shared_mean         one u_i, updated once a step with the mean of the entries' g_ik

A sample seen for the first time takes u_ik = g_ik (shared_mean: their mean). With identical views, per_pair and "sum",
AmCLR at omega = 1 is four times SogCLR.

Numerics: as in SogCLR; the published running maximum, which is never updated, has no counterpart here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from amclr_scale.declarations import read_by_masks
from amclr_scale.objectives.base import Layout, numbers, require
from amclr_scale.objectives.estimator import (
    Average,
    EstimatorOptions,
    KeepsEstimates,
    ratio,
    two_states,
    two_visits,
)
from amclr_scale.objectives.pairings import Pairings
from amclr_scale.types import Embeddings, Loss

State = Literal["per_pair", "shared_sequential", "shared_mean"]


@dataclass(frozen=True, kw_only=True)
class PairedOptions(EstimatorOptions):
    """Options of every objective over all pairings of views."""

    temperature: float = 0.01  # fixed, shared by all samples; every sample's first one where it is learned
    omega: int = 1  # further views per modality, 1 to 8
    state: Literal["per_pair", "shared_sequential", "shared_mean"] = "per_pair"  # shared_sequential: as published
    reduce: Literal["mean", "sum"] = "sum"  # sum: as published; mean: the scale of SogCLR for any omega

    def __post_init__(self) -> None:
        require(self.temperature > 0, "temperature", "a positive number", self.temperature)
        super().__post_init__()

    def pairings(self) -> Pairings:
        """What is contrasted with what: here images with texts."""
        return Pairings(self.omega)


class Paired(KeepsEstimates):
    """An objective over all pairings of views."""

    whole_set_options: ClassVar[Mapping[str, Any]] = {"state": "per_pair"}

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        return {**read_by_masks(options), "ids": True, "image_views": options.omega, "text_views": options.omega}


class PairedSogCLR(Paired):
    """What AmCLR and xAmCLR share: the value, and the state."""

    config: PairedOptions

    def __init__(self, config: PairedOptions, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.pairings = config.pairings()
        width = len(self.pairings.weights) if config.state == "per_pair" else 1
        self.image_state, self.text_state = two_states(
            config.num_samples, config.num_texts, config.columns(), sample_state, width=width
        )

    def forward(self, embeddings: Embeddings) -> Loss:
        config, t = self.config, self.config.temperature
        sides = self.pairings.compare(embeddings, t, t, self.masks(embeddings))
        weights = sides[0].log_g.new_tensor(self.pairings.weights)  # (K,)
        if config.reduce == "mean":
            weights = weights / weights.sum()

        averages: list[Average] = []
        value = objective = weights.new_zeros(())
        for side, visit in zip(sides, two_visits(embeddings, self.image_state, self.text_state), strict=True):
            old, log_g = visit.read(), side.log_g.detach()
            averages.append(config.average(old, self.epoch))
            log_u, kept = paired_average(old["log_u"], log_g, averages[-1], config.state)
            if self.learns:
                visit.write(log_u=kept, **config.counted(old, log_g))
            value = value + ((t * ratio(side.log_g, log_u)).mean(0) * weights).sum()
            objective = objective + ((t * log_u).mean(0) * weights).sum()
        return Loss(value, numbers(objective=objective, gamma=averages[0].mean_gamma))


class AmCLR(PairedSogCLR, name="amclr"):
    """SogCLR over all pairings of original and augmented images and texts."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PairedOptions):
        """Options of `amclr`."""


class XAmCLR(PairedSogCLR, name="xamclr"):
    """AmCLR plus the pairings of a sample's views inside each modality."""

    @dataclass(frozen=True, kw_only=True)
    class Config(PairedOptions):
        """Options of `xamclr`."""

        intra_weight: float = 1.0  # weight of a pairing inside a modality, beside 1 for image with text

        def pairings(self) -> Pairings:
            return Pairings(self.omega, self.intra_weight)


def paired_average(old: Tensor, log_g: Tensor, average: Average, state: State) -> tuple[Tensor, Tensor]:
    """Update the moving averages of a list.

    Args:
        old: (b, K) with per_pair, else (b, 1).
        log_g: (b, K).
        average: the rule.
        state: see above.

    Returns:
        What each entry divides by, (b, K), and what is kept, of the shape of old.
    """
    if state == "per_pair":
        log_u = average(old, log_g)
        return log_u, log_u
    if state == "shared_mean":
        seen = (~log_g.isneginf()).sum(1).clamp(min=1)  # an entry without keys says nothing
        mean = (log_g.logsumexp(1) - seen.to(log_g.dtype).log())[:, None]
        log_u = average(old, mean)
        return log_u.expand_as(log_g), log_u
    unseen, left = old.isneginf(), old  # (b, 1)
    columns: list[Tensor] = []
    for g in log_g.split(1, dim=1):
        left = average(left.masked_fill(unseen & ~g.isneginf(), -torch.inf), g)
        columns.append(left)
    return torch.cat(columns, 1), left
