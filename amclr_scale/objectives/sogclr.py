"""SogCLR: contrast each pair with the whole data set, through one moving average per sample and modality.

Yuan et al., "Provable Stochastic Optimization for Global Contrastive Learning: Small Batch Does Not Harm
Performance", ICML 2022, arXiv:2202.12387. The two-modality form is that of Qiu et al., ICML 2023, arXiv:2305.11965.

With h_ij = s_ij - s_ii over the negatives j != i of the batch (images i against texts j, and the other way round):

    objective  (1/N) sum_i t (log u_i + log u'_i),     u_i = mean over the data set of exp(h_ij / t)
    g_i      = mean_j exp(h_ij / t)                    this batch's estimate
    u_i     <- (1 - gamma) u_i + gamma g_i             u_i = g_i at first sight
    value    = mean_i t g_i / u_i + t g'_i / u'_i      u held constant: its gradient is the estimator's

Numerics: u is kept as log u, so the ratio never exceeds 1 / gamma and never starves (estimator.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from amclr_scale.declarations import Equal, read_by_masks
from amclr_scale.objectives.base import Layout, numbers, refuse_unread, require
from amclr_scale.objectives.estimator import (
    Average,
    EstimatorOptions,
    KeepsEstimates,
    centred,
    ratio,
    two_states,
    two_visits,
)
from amclr_scale.objectives.masking import refuse_masks
from amclr_scale.objectives.reference import check_reference, in_excess, without_references
from amclr_scale.types import Embeddings, Loss


class SogCLR(KeepsEstimates, name="sogclr"):
    """Global contrastive loss by a moving average per sample: small batches, the whole data set's negatives."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EstimatorOptions):
        """Options of `sogclr`."""

        temperature: float = 0.07  # fixed, shared by all samples
        surrogate: Literal["none", "squared_hinge"] = "none"  # squared_hinge: max(0, h + margin)^2 in place of h
        margin: float = 1.0  # c of the squared hinge
        reference: bool = False  # similarities count in excess of a frozen model's, as in drrho

        def __post_init__(self) -> None:
            require(self.temperature > 0, "temperature", "a positive number", self.temperature)
            super().__post_init__()
            refuse_masks(self, self.surrogate != "none")
            refuse_unread(self, ("margin",) if self.surrogate == "none" else (), "surrogate squared_hinge")
            check_reference(self, self.reference)

    config: Config

    @staticmethod
    def inputs_of(options: Any) -> Mapping[str, Any]:
        referred = {"image_reference": options.reference, "text_reference": options.reference}
        return {**read_by_masks(options), "ids": True, **referred}

    @staticmethod
    def equals(options: Any, B: int) -> Equal | None:
        if options.reference or options.gamma < 1 or options.gamma_schedule == "scent" or options.surrogate != "none":
            return None
        same = {key: getattr(options, key) for key in ("temperature", "mask_duplicates", "false_negative_margin")}
        return Equal("dcl", same, "at gamma = 1 SogCLR's gradient is DCL's times the temperature")

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.image_state, self.text_state = two_states(
            config.num_samples, config.num_texts, config.columns(), sample_state
        )

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = config.temperature
        masking = self.masks(embeddings)
        margin = config.margin if config.surrogate != "none" else None
        if config.reference:
            embeddings = in_excess(embeddings)
            masking = masking if margin is not None else without_references(masking, embeddings)
        sides = centred(embeddings.image, embeddings.text, t, masking, margin=margin)

        terms: list[Tensor] = []  # (b,) each
        log_us: list[Tensor] = []
        averages: list[Average] = []
        for side, visit in zip(sides, two_visits(embeddings, self.image_state, self.text_state), strict=True):
            old, log_g = visit.read(), side.log_g.detach()
            averages.append(config.average(old, self.epoch))
            log_u = averages[-1](old["log_u"], log_g)
            if self.learns:
                visit.write(log_u=log_u, **config.counted(old, log_g))
            terms.append(t * ratio(side.log_g, log_u))
            log_us.append(log_u)

        image_log_u, text_log_u = log_us
        return Loss(
            (terms[0] + terms[1]).mean(),
            numbers(
                objective=t * (image_log_u + text_log_u).mean(),
                log_u_image=image_log_u.mean(),
                gamma=averages[0].mean_gamma,
            ),
        )
