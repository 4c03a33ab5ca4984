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

from amclr_scale.objectives.base import Layout, Objective, at_least_float32, numbers, require
from amclr_scale.objectives.estimator import (
    centred,
    check_gamma,
    gamma_at,
    log_moving_average,
    two_states,
    two_visits,
)
from amclr_scale.objectives.temperature_generator import TempGenerator, TempGenerators
from amclr_scale.objectives.temperatures import Descent, check_robust, temperature_gradient
from amclr_scale.similarity import map_rows
from amclr_scale.types import Embeddings, Loss


class ISogCLR(Objective, name="isogclr"):
    """Robust global contrastive loss: SogCLR with a learned temperature for every sample."""

    needs_ids = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `isogclr`."""

        num_samples: int  # images in the data set
        num_texts: int | None = None  # texts in the data set, where that is another number
        temperature: float = 0.01  # every sample's first temperature
        gamma: float = 0.8  # weight of the newest batch in u
        gamma_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from 1 in epoch 0 to gamma
        gamma_epochs: float | None = None  # epochs the cosine takes
        rho: float = 8.0  # radius of the robust loss: the KL divergence that temperatures aim at
        eta: float = 0.03  # step size of the temperatures
        eta_schedule: Literal["constant", "cosine", "exponential"] = "constant"  # by epoch
        eta_min: float = 0.0001  # where the schedules of eta end
        eta_epochs: float | None = None  # epochs the cosine of eta takes
        beta: float = 0.9  # weight of the newest gradient in the temperatures' moving average
        gradient_clip: float = 5.0  # bound on a temperature's gradient
        temperature_min: float = 0.005  # bounds of the temperatures
        temperature_max: float = 0.05
        surrogate: Literal["none", "squared_hinge"] = "none"  # squared_hinge: max(0, h + margin)^2 in place of h
        margin: float = 1.0  # c of the squared hinge

        def __post_init__(self) -> None:
            require(self.temperature > 0, "temperature", "a positive number", self.temperature)
            check_gamma(self.gamma, self.gamma_schedule, self.gamma_epochs)
            self.descent()
            check_robust(self.rho, self.temperature, self.temperature_min, self.temperature_max)

        def descent(self) -> Descent:
            """The temperatures' rule."""
            return Descent(
                self.eta,
                self.beta,
                self.gradient_clip,
                self.temperature_min,
                self.temperature_max,
                self.eta_schedule,
                self.eta_min,
                self.eta_epochs,
            )

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__()
        self.config, self.descent = config, config.descent()
        columns = {"log_u": -float("inf"), "temperature": config.temperature, "v": 0.0}
        self.image_state, self.text_state = two_states(config.num_samples, config.num_texts, columns, sample_state)

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        gamma = gamma_at(self.epoch, config.gamma, config.gamma_schedule, config.gamma_epochs)
        visits = two_visits(embeddings, self.image_state, self.text_state)
        olds = [visit.read() for visit in visits]
        image_t, text_t = (old["temperature"] for old in olds)  # (b,)
        margin = config.margin if config.surrogate != "none" else None
        sides = centred(embeddings.image, embeddings.text, (image_t, text_t), margin)

        terms: list[Tensor] = []  # (b,) each
        objectives: list[Tensor] = []
        for side, visit, old in zip(sides, visits, olds, strict=True):
            t = old["temperature"].to(side.log_g.dtype)
            log_u = log_moving_average(old["log_u"], side.log_g.detach(), gamma)
            if self.learns:
                r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)
                new_t, v = self.descent.step(t, old["v"], r, self.epoch)
                visit.write(log_u=log_u, temperature=new_t, v=v)
            terms.append(t * (side.log_g - log_u).exp())
            objectives.append(t * (log_u + config.rho))

        return Loss(
            (terms[0] + terms[1]).mean(),
            numbers(
                objective=(objectives[0] + objectives[1]).mean(),
                temperature_image=image_t.mean(),
                temperature_image_std=image_t.std(correction=0),
                temperature_text=text_t.mean(),
                temperature_text_std=text_t.std(correction=0),
            ),
        )


class ISogCLRNet(Objective, name="isogclr_net"):
    """iSogCLR whose temperatures come from a small network in the model (TempNet, "modified iSogCLR")."""

    needs_ids = True
    needs_temperatures = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `isogclr_net`."""

        num_samples: int  # images in the data set
        num_texts: int | None = None  # texts in the data set, where that is another number
        gamma: float = 0.8  # weight of the newest batch in u
        gamma_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from 1 in epoch 0 to gamma
        gamma_epochs: float | None = None  # epochs the cosine takes
        rho: float = 8.0  # radius of the robust loss
        num_prototypes: int = 256  # of each generator
        temperature_min: float = 0.005  # bounds of the temperatures
        temperature_max: float = 0.05
        diversity: float = 0.0  # weight of the mean over pairs of max(0, z_i . z_j)^2 inside a modality: our reading

        def __post_init__(self) -> None:
            check_gamma(self.gamma, self.gamma_schedule, self.gamma_epochs)
            require(self.rho >= 0, "rho", "a divergence of at least 0", self.rho)
            require(self.diversity >= 0, "diversity", "a weight of at least 0", self.diversity)
            low, high = self.temperature_min, self.temperature_max
            require(0 < low < high, "temperature_min", "0 < temperature_min < temperature_max", low)
            require(self.num_prototypes > 1, "num_prototypes", "at least 2", self.num_prototypes)

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__()
        self.config = config
        self.image_state, self.text_state = two_states(
            config.num_samples, config.num_texts, {"log_u": -float("inf")}, sample_state
        )

    def temperature_generators(self, width: int) -> TempGenerators:
        """Fresh generators for embeddings of this width; they belong into the model, as `DualEncoder.temperatures`."""

        def one() -> TempGenerator:
            return TempGenerator(
                width,
                num_prototypes=self.config.num_prototypes,
                temperature_min=self.config.temperature_min,
                temperature_max=self.config.temperature_max,
            )

        return TempGenerators(one(), one())

    def forward(self, embeddings: Embeddings) -> Loss:
        """The value is mean_i t_i g_i / u_i + r_i t_i: features see t_i as constant, and t_i's gradient is r_i / B."""
        config = self.config
        gamma = gamma_at(self.epoch, config.gamma, config.gamma_schedule, config.gamma_epochs)
        image_t, text_t = _generated(embeddings)
        sides = centred(embeddings.image, embeddings.text, (image_t.detach(), text_t.detach()))

        value = objective = image_t.new_zeros(())
        visits = two_visits(embeddings, self.image_state, self.text_state)
        for side, visit, t in zip(sides, visits, (image_t, text_t), strict=True):
            log_u = log_moving_average(visit.read()["log_u"], side.log_g.detach(), gamma)
            if self.learns:
                visit.write(log_u=log_u)
            r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)
            value = value + (t.detach() * (side.log_g - log_u).exp() + r * t).mean()
            objective = objective + (t.detach() * (log_u + config.rho)).mean()
        if config.diversity:
            penalty = likeness(embeddings.image) + likeness(embeddings.text)
            value, objective = value + config.diversity * penalty, objective + config.diversity * penalty
        return Loss(
            value,
            numbers(
                objective=objective,
                temperature_image=image_t.mean(),
                temperature_image_std=image_t.std(correction=0),
                temperature_text=text_t.mean(),
                temperature_text_std=text_t.std(correction=0),
            ),
        )


def _generated(embeddings: Embeddings) -> tuple[Tensor, Tensor]:
    found: list[Tensor] = []
    for field, t in (
        ("image_temperature", embeddings.image_temperature),
        ("text_temperature", embeddings.text_temperature),
    ):
        shape = embeddings.image.shape[:1]
        require(
            t is not None and t.shape == shape,
            f"embeddings.{field}",
            f"one temperature per sample, {tuple(shape)}",
            None if t is None else tuple(t.shape),
            fix="give the model its temperature_generators()",
        )
        assert t is not None
        found.append(at_least_float32(t))
    return found[0], found[1]


def likeness(x: Tensor) -> Tensor:
    """Mean over j != i, and over this rank's rows i, of max(0, x_i . x_j)^2: a tensor ()."""

    def rows(block: Tensor, positive: Tensor) -> tuple[Tensor, ...]:
        squares = block.clamp(min=0).square().scatter(1, positive[:, None], 0.0)
        return (squares.sum(1) / (block.shape[1] - 1),)

    return map_rows(rows, x, x)[0].mean()
