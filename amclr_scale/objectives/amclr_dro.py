"""AmCLR and xAmCLR with iSogCLR's temperatures.

The entries k are those of pairings.py and their moving averages u_ik those of amclr.py; every sample's temperature is
learned as in temperatures.py:

    objective   sum_k weight_k mean_i t_ik (log u_ik + rho)  (+ the text list's)
    value       sum_k weight_k mean_i t_ik g_ik / u_ik       (+ the text list's)      t and u held constant

With state = "per_pair" each entry has its own u_ik, t_ik and v_ik. With a shared state a sample has one temperature
per modality, whose gradient is the weighted mean over entries of r_ik.

Numerics: as in iSogCLR; everything exponential is kept as a logarithm.
"""

from dataclasses import dataclass

from torch import Tensor

from amclr_scale.objectives.amclr import Paired, PairedOptions, paired_average
from amclr_scale.objectives.base import Layout, numbers
from amclr_scale.objectives.estimator import ratio, two_states, two_visits
from amclr_scale.objectives.pairings import Pairings
from amclr_scale.objectives.temperatures import RobustOptions, spread, temperature_gradient
from amclr_scale.types import Embeddings, Loss


@dataclass(frozen=True, kw_only=True)
class RobustPairedOptions(PairedOptions, RobustOptions):
    """Options of both: with a shared state, one temperature as well."""


class PairedISogCLR(Paired):
    """What AmCLR-DRO and xAmCLR-DRO share: the value, and the state."""

    config: RobustPairedOptions

    def __init__(self, config: RobustPairedOptions, sample_state: Layout = "auto") -> None:
        super().__init__(config)
        self.pairings, self.descent = config.pairings(), config.descent()
        self.image_state, self.text_state = two_states(
            config.num_samples,
            config.num_texts,
            {**config.columns(), "temperature": config.temperature, "v": 0.0},
            sample_state,
            width=len(self.pairings.weights) if config.state == "per_pair" else 1,
        )

    def forward(self, embeddings: Embeddings) -> Loss:
        config, num_entries = self.config, len(self.pairings.weights)
        visits = two_visits(embeddings, self.image_state, self.text_state)
        olds = [visit.read() for visit in visits]
        image_t, text_t = (old["temperature"].expand(-1, num_entries) for old in olds)  # (b, K)
        sides = self.pairings.compare(embeddings, image_t, text_t, self.masks(embeddings))
        weights = sides[0].log_g.new_tensor(self.pairings.weights)  # (K,)
        share = weights / weights.sum()
        if config.reduce == "mean":
            weights = share

        value = objective = weights.new_zeros(())
        for side, visit, old in zip(sides, visits, olds, strict=True):
            t: Tensor = old["temperature"].to(side.log_g.dtype)  # (b, K), or (b, 1) where shared
            log_g, average = side.log_g.detach(), config.average(old, self.epoch)
            log_u, kept = paired_average(old["log_u"], log_g, average, config.state)
            if self.learns:
                r = temperature_gradient(log_u, side.log_g, side.expected, config.rho)  # (b, K)
                if config.state != "per_pair":
                    r = (r * share).sum(1, keepdim=True)
                new_t, v = self.descent.step(t, old["v"], r, self.epoch)
                visit.write(log_u=kept, **config.counted(old, log_g), temperature=new_t, v=v)
            value = value + ((t * ratio(side.log_g, log_u)).mean(0) * weights).sum()
            objective = objective + ((t * (log_u + config.rho)).mean(0) * weights).sum()
        return Loss(
            value,
            numbers(
                objective=objective,
                **spread(image_t, text_t),
            ),
        )


class AmCLRDRO(PairedISogCLR, name="amclr_dro"):
    """AmCLR with a learned temperature for every sample (and pairing)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RobustPairedOptions):
        """Options of `amclr_dro`."""


class XAmCLRDRO(PairedISogCLR, name="xamclr_dro"):
    """xAmCLR with a learned temperature for every sample (and pairing)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(RobustPairedOptions):
        """Options of `xamclr_dro`."""

        intra_weight: float = 1.0  # weight of a pairing inside a modality, beside 1 for image with text

        def pairings(self) -> Pairings:
            return Pairings(self.omega, self.intra_weight)
