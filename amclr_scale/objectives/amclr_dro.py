"""AmCLR and xAmCLR with iSogCLR's temperatures.

The entries k are those of pairings.py and their moving averages u_ik those of amclr.py; every sample's temperature is
learned as in temperatures.py:

    objective   sum_k weight_k mean_i t_ik (log u_ik + rho)  (+ the text list's)
    value       sum_k weight_k mean_i t_ik g_ik / u_ik       (+ the text list's)      t and u held constant

With state = "per_pair" each entry has its own u_ik, t_ik and v_ik. With a shared state a sample has one temperature
per modality, whose gradient is the weighted mean over entries of r_ik.

Numerics: as in iSogCLR; everything exponential is kept as a logarithm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from amclr_scale.objectives.amclr import paired_average
from amclr_scale.objectives.base import Layout, Objective, numbers, require
from amclr_scale.objectives.estimator import check_gamma, gamma_at, two_states, two_visits
from amclr_scale.objectives.pairings import Pairings
from amclr_scale.objectives.temperatures import Descent, check_robust, temperature_gradient
from amclr_scale.types import Embeddings, Loss


class PairedISogCLR(Objective):
    """What AmCLR-DRO and xAmCLR-DRO share: the value, and the state."""

    needs_ids = True
    whole_set_options: ClassVar[Mapping[str, Any]] = {"state": "per_pair"}

    def __init__(self, config: "AmCLRDRO.Config | XAmCLRDRO.Config", pairings: Pairings, layout: Layout) -> None:
        super().__init__()
        self.paired_config, self.pairings, self.needs_views = config, pairings, pairings.omega
        self.descent = _descent(config)
        self.image_state, self.text_state = two_states(
            config.num_samples,
            config.num_texts,
            {"log_u": -float("inf"), "temperature": config.temperature, "v": 0.0},
            layout,
            width=len(pairings.weights) if config.state == "per_pair" else 1,
        )

    def forward(self, embeddings: Embeddings) -> Loss:
        config, num_entries = self.paired_config, len(self.pairings.weights)
        gamma = gamma_at(self.epoch, config.gamma, config.gamma_schedule, config.gamma_epochs)
        visits = two_visits(embeddings, self.image_state, self.text_state)
        olds = [visit.read() for visit in visits]
        image_t, text_t = (old["temperature"].expand(-1, num_entries) for old in olds)  # (b, K)
        sides = self.pairings.compare(embeddings, image_t, text_t)
        weights = sides[0].log_g.new_tensor(self.pairings.weights)  # (K,)
        share = weights / weights.sum()
        if config.reduce == "mean":
            weights = share

        value = objective = weights.new_zeros(())
        for side, visit, old in zip(sides, visits, olds, strict=True):
            t: Tensor = old["temperature"].to(side.log_g.dtype)  # (b, K), or (b, 1) where shared
            log_u, kept = paired_average(old["log_u"], side.log_g.detach(), gamma, config.state)
            if self.learns:
                r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)  # (b, K)
                if config.state != "per_pair":
                    r = (r * share).sum(1, keepdim=True)
                new_t, v = self.descent.step(t, old["v"], r, self.epoch)
                visit.write(log_u=kept, temperature=new_t, v=v)
            value = value + ((t * (side.log_g - log_u).exp()).mean(0) * weights).sum()
            objective = objective + ((t * (log_u + config.rho)).mean(0) * weights).sum()
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


class AmCLRDRO(PairedISogCLR, name="amclr_dro"):
    """AmCLR with a learned temperature for every sample (and pairing)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `amclr_dro`."""

        num_samples: int  # images in the data set
        num_texts: int | None = None  # texts in the data set, where that is another number
        temperature: float = 0.01  # every sample's first temperature
        gamma: float = 0.8  # weight of the newest batch in u
        gamma_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from 1 in epoch 0 to gamma
        gamma_epochs: float | None = None  # epochs the cosine takes
        omega: int = 1  # further views per modality, 1 to 8
        state: Literal["per_pair", "shared_sequential", "shared_mean"] = "per_pair"  # shared: one temperature as well
        reduce: Literal["mean", "sum"] = "sum"  # over pairings
        rho: float = 8.0  # radius of the robust loss
        eta: float = 0.03  # step size of the temperatures
        eta_schedule: Literal["constant", "cosine", "exponential"] = "constant"  # by epoch
        eta_min: float = 0.0001  # where the schedules of eta end
        eta_epochs: float | None = None  # epochs the cosine of eta takes
        beta: float = 0.9  # weight of the newest gradient in the temperatures' moving average
        gradient_clip: float = 5.0  # bound on a temperature's gradient
        temperature_min: float = 0.005  # bounds of the temperatures
        temperature_max: float = 0.05

        def __post_init__(self) -> None:
            _check(self)

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config, Pairings(config.omega), sample_state)


class XAmCLRDRO(PairedISogCLR, name="xamclr_dro"):
    """xAmCLR with a learned temperature for every sample (and pairing)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """Options of `xamclr_dro`."""

        num_samples: int  # images in the data set
        num_texts: int | None = None  # texts in the data set, where that is another number
        temperature: float = 0.01  # every sample's first temperature
        gamma: float = 0.8  # weight of the newest batch in u
        gamma_schedule: Literal["constant", "cosine"] = "constant"  # cosine: from 1 in epoch 0 to gamma
        gamma_epochs: float | None = None  # epochs the cosine takes
        omega: int = 1  # further views per modality, 1 to 8
        state: Literal["per_pair", "shared_sequential", "shared_mean"] = "per_pair"  # shared: one temperature as well
        reduce: Literal["mean", "sum"] = "sum"  # over pairings
        intra_weight: float = 1.0  # weight of a pairing inside a modality, beside 1 for image with text
        rho: float = 8.0  # radius of the robust loss
        eta: float = 0.03  # step size of the temperatures
        eta_schedule: Literal["constant", "cosine", "exponential"] = "constant"  # by epoch
        eta_min: float = 0.0001  # where the schedules of eta end
        eta_epochs: float | None = None  # epochs the cosine of eta takes
        beta: float = 0.9  # weight of the newest gradient in the temperatures' moving average
        gradient_clip: float = 5.0  # bound on a temperature's gradient
        temperature_min: float = 0.005  # bounds of the temperatures
        temperature_max: float = 0.05

        def __post_init__(self) -> None:
            _check(self)

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config, Pairings(config.omega, config.intra_weight), sample_state)


def _check(config: AmCLRDRO.Config | XAmCLRDRO.Config) -> None:
    require(config.temperature > 0, "temperature", "a positive number", config.temperature)
    check_gamma(config.gamma, config.gamma_schedule, config.gamma_epochs)
    _descent(config)
    check_robust(config.rho, config.temperature, config.temperature_min, config.temperature_max)


def _descent(config: AmCLRDRO.Config | XAmCLRDRO.Config) -> Descent:
    return Descent(
        config.eta,
        config.beta,
        config.gradient_clip,
        config.temperature_min,
        config.temperature_max,
        config.eta_schedule,
        config.eta_min,
        config.eta_epochs,
    )
