"""iSogCLR: SogCLR with a temperature for every image and every text, found by distributionally robust optimisation.

Qiu et al., "Not All Semantics are Created Equal: Contrastive Self-supervised Learning with Automatic Temperature
Individualization", ICML 2023, arXiv:2305.11965.

With u_i as in SogCLR at the sample's own temperature t_i, and the radius rho:

    objective  (1/N) sum_i t_i (log u_i + rho) + t'_i (log u'_i + rho)      minimised over features and temperatures
    value      mean_i t_i g_i / u_i + t'_i g'_i / u'_i                     u and t held constant
    t_i        as in temperatures.py, after the features' gradient used the old one

With eta = 0 the gradient is SogCLR's, scale included.

Numerics: log u, never u; at a temperature of 0.005 the exponents reach 400 and stay logarithms.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from amclr_scale.objectives.base import Layout, at_least_float32, numbers, refuse_unread, require
from amclr_scale.objectives.estimator import (
    EstimatorOptions,
    KeepsEstimates,
    centred,
    ratio,
    two_states,
    two_visits,
)
from amclr_scale.objectives.masking import refuse_masks
from amclr_scale.objectives.temperature_generator import TempGenerator, TempGenerators
from amclr_scale.objectives.temperatures import RobustOptions, spread, temperature_gradient
from amclr_scale.similarity import mean_rows
from amclr_scale.types import Embeddings, Loss


class ISogCLR(KeepsEstimates, name="isogclr"):
    """Robust global contrastive loss: SogCLR with a learned temperature for every sample."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RobustOptions):
        """Options of `isogclr`."""

        surrogate: Literal["none", "squared_hinge"] = "none"  # squared_hinge: max(0, h + margin)^2 in place of h
        margin: float = 1.0  # c of the squared hinge

        def __post_init__(self) -> None:
            super().__post_init__()
            refuse_masks(self, self.surrogate != "none")
            refuse_unread(self, ("margin",) if self.surrogate == "none" else (), "surrogate squared_hinge")

    config: Config

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.descent = config.descent()
        columns = {**config.columns(), "temperature": config.temperature, "v": 0.0}
        self.image_state, self.text_state = two_states(config.num_samples, config.num_texts, columns, sample_state)

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        visits = two_visits(embeddings, self.image_state, self.text_state)
        olds = [visit.read() for visit in visits]
        image_t, text_t = (old["temperature"] for old in olds)  # (b,)
        margin = config.margin if config.surrogate != "none" else None
        sides = centred(embeddings.image, embeddings.text, (image_t, text_t), self.masks(embeddings), margin=margin)

        terms: list[Tensor] = []  # (b,) each
        objectives: list[Tensor] = []
        for side, visit, old in zip(sides, visits, olds, strict=True):
            t = old["temperature"].to(side.log_g.dtype)
            log_g = side.log_g.detach()
            log_u = config.average(old, self.epoch)(old["log_u"], log_g)
            if self.learns:
                r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)
                new_t, v = self.descent.step(t, old["v"], r, self.epoch)
                visit.write(log_u=log_u, **config.counted(old, log_g), temperature=new_t, v=v)
            terms.append(t * ratio(side.log_g, log_u))
            objectives.append(t * (log_u + config.rho))

        return Loss(
            (terms[0] + terms[1]).mean(),
            numbers(
                objective=(objectives[0] + objectives[1]).mean(),
                **spread(image_t, text_t),
            ),
        )


class ISogCLRNet(KeepsEstimates, name="isogclr_net"):
    """iSogCLR whose temperatures come from a small network in the model (TempNet, "modified iSogCLR")."""

    @dataclass(frozen=True, kw_only=True)
    class Config(EstimatorOptions):
        """Options of `isogclr_net`."""

        rho: float = 8.0  # radius of the robust loss
        num_prototypes: int = 256  # of each generator
        temperature_min: float = 0.005  # bounds of the temperatures
        temperature_max: float = 0.05
        diversity: float = 0.0  # weight of the mean over pairs of max(0, z_i . z_j)^2 inside a modality: our reading

        def __post_init__(self) -> None:
            super().__post_init__()
            require(self.rho >= 0, "rho", "a divergence of at least 0", self.rho)
            require(self.diversity >= 0, "diversity", "a weight of at least 0", self.diversity)
            low, high = self.temperature_min, self.temperature_max
            require(0 < low < high, "temperature_min", "0 < temperature_min < temperature_max", low)
            require(self.num_prototypes > 1, "num_prototypes", "at least 2", self.num_prototypes)

    config: Config

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.image_state, self.text_state = two_states(
            config.num_samples, config.num_texts, config.columns(), sample_state
        )

    @staticmethod
    def model_parts(options: Config, width: int) -> TempGenerators:
        """A generator for images and one for texts; they give `image_temperature` and `text_temperature`."""

        def one() -> TempGenerator:
            return TempGenerator(
                width,
                num_prototypes=options.num_prototypes,
                temperature_min=options.temperature_min,
                temperature_max=options.temperature_max,
            )

        return TempGenerators(one(), one())

    def forward(self, embeddings: Embeddings) -> Loss:
        """The value is mean_i t_i g_i / u_i + r_i t_i: features see t_i as constant, and t_i's gradient is r_i / B."""
        config = self.config
        image_t, text_t = _generated(embeddings)
        detached = (image_t.detach(), text_t.detach())
        sides = centred(embeddings.image, embeddings.text, detached, self.masks(embeddings))

        value = objective = image_t.new_zeros(())
        visits = two_visits(embeddings, self.image_state, self.text_state)
        for side, visit, t in zip(sides, visits, (image_t, text_t), strict=True):
            old, log_g = visit.read(), side.log_g.detach()
            log_u = config.average(old, self.epoch)(old["log_u"], log_g)
            if self.learns:
                visit.write(log_u=log_u, **config.counted(old, log_g))
            r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)
            value = value + (t.detach() * ratio(side.log_g, log_u) + r * t).mean()
            objective = objective + (t.detach() * (log_u + config.rho)).mean()
        if config.diversity:
            penalty = likeness(embeddings.image) + likeness(embeddings.text)
            value, objective = value + config.diversity * penalty, objective + config.diversity * penalty
        return Loss(
            value,
            numbers(
                objective=objective,
                **spread(image_t, text_t),
            ),
        )


def _generated(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    found: list[Tensor] = []
    for field in ("image_temperature", "text_temperature"):
        t: Tensor = getattr(embeddings, field)
        shape = embeddings.image.shape[:1]
        require(t.shape == shape, f"embeddings.{field}", f"one temperature per sample, {tuple(shape)}", tuple(t.shape))
        found.append(at_least_float32(t))
    return found[0], found[1]


def likeness(x: Tensor) -> Tensor:
    """Mean over j != i, and over this rank's rows i, of max(0, x_i . x_j)^2: a tensor ()."""

    def rows(block: Tensor, positive: Tensor) -> Tensor:
        squares = block.clamp(min=0).square().scatter(1, positive[:, None], 0.0)
        return squares.sum(1) / (block.shape[1] - 1)

    return mean_rows(rows, x, x)
