"""SCENT: SogCLR whose moving average is a proximal step in the log domain, with a rate of each sample's own.

"A Geometry-Aware Efficient Algorithm for Compositional Entropic Risk Minimization", 2026, arXiv:2602.02877.

With g_i as in SogCLR (estimator.py), the objective is a minimum over one dual variable nu_i per sample and modality,

    log g_i  = min over nu of  exp(-nu) g_i + nu - 1                                        at nu = log g_i

and a batch moves nu_i by one step of size alpha that is proximal in the Bregman divergence of exp(-nu):

    exp(nu_i') = exp(nu_i) (1 + alpha g_i) / (1 + alpha exp(nu_i))                     nu_i' = log g_i at first sight
    value      = mean_i t g_i exp(-nu_i') + t g''_i exp(-nu''_i')       nu' held constant; '' is the text anchors'
    objective  mean_i t (nu_i' + nu''_i')

That is a moving average with gamma_i = sigmoid(log alpha + nu_i): an anchor whose estimate is large, which is one that
does not yet win, forgets quickly, one that wins by far slowly. alpha to infinity is SogCLR at gamma = 1. With a learned
temperature the objective is FastCLIP v3's, t (2 rho + mean_i (nu_i' + nu''_i')), here summed over both directions.

Numerics: nu' = nu + log(1 + alpha g) - log(1 + alpha exp(nu)), of logarithms only: nothing overflows at any alpha.
"""

from dataclasses import dataclass

from torch import Tensor

from amclr_scale.objectives.base import Layout, learned_temperature, numbers, require
from amclr_scale.objectives.clip import check_temperature
from amclr_scale.objectives.estimator import (
    KeepsEstimates,
    TableOptions,
    adaptive_gamma,
    centred,
    check_log_alpha,
    dual_step,
    ratio,
    two_states,
    two_visits,
)
from amclr_scale.types import Embeddings, Loss


class SCENT(KeepsEstimates, name="scent"):
    """SogCLR with a rate of its own for every sample: a proximal step of a dual variable in the log domain."""

    @dataclass(frozen=True, kw_only=True)
    class Config(TableOptions):
        """Options of `scent`."""

        temperature: float | None = 0.07  # fixed, shared by all samples; null: learned, 1 / logit_scale
        log_alpha: float = 10.0  # logarithm of the dual step: gamma is 1/2 where log u is -log_alpha
        rho: float = 0.0  # radius of the robust loss that a learned temperature minimises, as FastCLIP v3's

        def __post_init__(self) -> None:
            super().__post_init__()
            check_temperature(self.temperature)
            check_log_alpha(self.log_alpha)
            require(self.rho >= 0, "rho", "a divergence of at least 0", self.rho)
            unused = self.temperature is None or self.rho == 0
            require(unused, "rho", "0 for a fixed temperature, which it says nothing about", self.rho)

    config: Config

    def __init__(self, config: Config, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.image_state, self.text_state = two_states(
            config.num_samples, config.num_texts, {"log_u": -float("inf")}, sample_state
        )

    def forward(self, embeddings: Embeddings) -> Loss:
        config = self.config
        t = learned_temperature(embeddings, config.temperature)
        held = t.detach().squeeze() if isinstance(t, Tensor) else t
        sides = centred(embeddings.image, embeddings.text, t, self.masks(embeddings))

        ratios: list[Tensor] = []  # (b,) each
        nus: list[Tensor] = []
        gammas: list[Tensor] = []
        for side, visit in zip(sides, two_visits(embeddings, self.image_state, self.text_state), strict=True):
            old = visit.read()["log_u"]
            nu = dual_step(old, side.log_g.detach(), config.log_alpha)
            if self.learns:
                visit.write(log_u=nu)
            ratios.append(ratio(side.log_g, nu))
            nus.append(nu)
            gammas.append(adaptive_gamma(old, config.log_alpha))

        mean_nu = (nus[0] + nus[1]).mean()
        value, robust = held * (ratios[0] + ratios[1]).mean(), 2 * config.rho + mean_nu
        if config.temperature is None:
            value = value + (t * robust).sum()
        return Loss(
            value,
            numbers(objective=held * robust, temperature=held, log_u_image=nus[0].mean(), gamma=gammas[0].mean()),
        )
